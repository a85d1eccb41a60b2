"""Leave the process of somebody else as it was."""

import logging
import os
from collections.abc import Iterator
from contextlib import contextmanager

from torchtitan.utils.host import spin_briefly


@contextmanager
def process_as_it_was() -> Iterator[None]:
    """Undo, at the end, what a run changes in its process.

    These are variables, threads, random numbers, deterministic algorithms and log messages; the
    rest is undone where it is changed.
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
        with torch.random.fork_rng(devices):
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
