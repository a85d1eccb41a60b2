"""Leave the process of somebody else as it was."""

import logging
import os
import sys
import threading
from collections.abc import Iterator
from contextlib import ExitStack, contextmanager

from torchtitan.utils.host import spin_briefly

_AT_WORK = threading.Lock()


@contextmanager
def one_at_a_time() -> Iterator[None]:
    """Raise RuntimeError for a second run at the same time: both would change the process."""
    if not _AT_WORK.acquire(blocking=False):
        text = "another thread of this process trains: wait for it, or start a process for each run"
        raise RuntimeError(text)
    try:
        yield
    finally:
        _AT_WORK.release()


@contextmanager
def plain_torch() -> Iterator[None]:
    """Undo, for the time within, the modes that the caller may have entered.

    These are `no_grad`, `inference_mode`, `autocast` and a default device.
    """
    import torch

    with ExitStack() as stack:
        # init_process_group replaces it, and destroy_process_group leaves it.
        stack.callback(setattr, sys, "excepthook", sys.excepthook)
        stack.enter_context(torch.inference_mode(False))
        stack.enter_context(torch.enable_grad())
        for kind in ("cpu", "cuda"):
            if torch.is_autocast_enabled(kind):
                stack.enter_context(torch.autocast(kind, enabled=False))
        if torch.get_default_device().type != "cpu":
            stack.enter_context(torch.device("cpu"))
        yield


@contextmanager
def process_as_it_was() -> Iterator[None]:
    """Undo, at the end, what a run changes in its process.

    These are variables, threads, random numbers, deterministic algorithms, log messages and how
    errors are printed; the rest is undone where it is changed.
    """
    variables = dict(os.environ)
    logger = logging.getLogger("torchtitan")
    level, handlers = logger.level, list(logger.handlers)
    spin_briefly()  # before torch is imported
    import torch

    threads, benchmark = torch.get_num_threads(), torch.backends.cudnn.benchmark
    deterministic = torch.are_deterministic_algorithms_enabled()
    warns = torch.is_deterministic_algorithms_warn_only_enabled()
    devices = [torch.cuda.current_device()] if torch.cuda.is_initialized() else []
    try:
        with torch.random.fork_rng(devices), plain_torch():
            yield
    finally:
        torch.use_deterministic_algorithms(deterministic, warn_only=warns)
        torch.backends.cudnn.benchmark = benchmark
        torch.set_num_threads(threads)
        logger.setLevel(level)
        logger.handlers[:] = handlers
        for name in os.environ.keys() - variables.keys():
            del os.environ[name]
        os.environ.update(variables)
