"""Saving while training goes on: copies of the tensors, and the thread that writes them."""

import logging
import os
import sys
import threading
import time
from collections.abc import Callable, Mapping
from contextlib import nullcontext, suppress
from typing import Any

import torch
from torch import Tensor

from torchtitan.config import CheckpointError
from torchtitan.utils.torch_compat import local_tensor, with_local

logger = logging.getLogger(__name__)

_LOGGED_WAIT_SECONDS = 0.05
_NICENESS = 10
"""About a tenth of a core that a step wants as well; all of an idle one. At the lowest priority,
19, a save on a busy machine would not end before the next one is due."""


class _Thread(threading.Thread):
    """A thread that saves; not a daemon, because one that is cut off can crash the interpreter."""


def is_saving() -> bool:
    """Return whether a thread of this process is writing a checkpoint."""
    return any(isinstance(thread, _Thread) for thread in threading.enumerate())


def wait_for_saves() -> None:
    """Wait until no thread of this process writes a checkpoint."""
    for thread in threading.enumerate():
        if isinstance(thread, _Thread):
            thread.join()


class SaveThread:
    """One save at a time on a thread; `wait` comes before the next one and raises its error.

    A thread dies with its process, whereas a process that went on writing could race the restarted
    job.
    """

    def __init__(self) -> None:
        self._thread: _Thread | None = None
        self._error: BaseException | None = None
        self._step = -1

    def start(self, step: int, action: Callable[[], None]) -> None:
        """Begin to save `step`; return at once."""
        assert self._thread is None, "wait() comes first: never two saves at a time"
        self._step = step
        self._thread = _Thread(target=self._run, args=(action,), name=f"save-{step}")
        self._thread.start()

    @property
    def failed(self) -> bool:
        """Return whether the last save has failed and `wait` has not raised its error yet."""
        return self._error is not None

    def wait(self) -> None:
        """Wait for the save under way; raise its error, once, as `CheckpointError`."""
        thread, self._thread = self._thread, None
        if thread is None:
            return
        if thread.is_alive():
            started = time.monotonic()
            thread.join()
            seconds = time.monotonic() - started
            if seconds > _LOGGED_WAIT_SECONDS:
                text = "Waited %.1f s for the checkpoint of step %d, which was still being written."
                logger.info(text, seconds, self._step)
        error, self._error = self._error, None
        if error is None:
            return
        if isinstance(error, CheckpointError):
            raise error
        what = f"the checkpoint of step {self._step} was not saved"
        raise CheckpointError(f"{what}: {type(error).__name__}: {error}") from error

    def _run(self, action: Callable[[], None]) -> None:
        try:
            _lower_priority()
            action()
        except BaseException as error:  # DCP's CheckpointException is not an Exception
            self._error = error


def _lower_priority() -> None:
    """Let training have the cores first: on a CPU a step waits for its slowest thread.

    Linux has priorities per thread and derives those of the disk from them. They are never raised,
    which few users may do: `nice` may have started the run with a lower one.
    """
    if sys.platform != "linux":
        return
    thread = threading.get_native_id()
    with suppress(OSError):  # a container may forbid it
        niceness = max(_NICENESS, os.getpriority(os.PRIO_PROCESS, thread))
        os.setpriority(os.PRIO_PROCESS, thread, niceness)


class Staging:
    """Copies of tensors in host memory, so that training may change the tensors meanwhile.

    On a CPU a copy is made at once. On a GPU a side stream makes `pinned` copies during the next
    forward and backward, and the optimizer waits for them on the device, so the host never waits.
    Pinned memory is kept for the next save, because pinning takes long.
    """

    def __init__(self, pinned: bool):
        self._pinned = pinned
        self._kept: dict[str, Tensor] = {}
        self._stream: torch.cuda.Stream | None = None
        self._copied: torch.cuda.Event | None = None

    def start(self, tensors: Mapping[str, Tensor]) -> dict[str, Tensor]:
        """Copy this rank's part of `tensors`; DTensors stay DTensors.

        Read the copies after `finish`; the originals may change after `wait_for_staging`.
        """
        locals_ = {name: local_tensor(tensor.detach()) for name, tensor in tensors.items()}
        with self._side_stream(any(local.is_cuda for local in locals_.values())):
            copies = {name: self._copy(name, local) for name, local in locals_.items()}
            if self._stream is not None:
                self._copied = torch.cuda.Event()
                self._copied.record(self._stream)
        return {name: with_local(tensor, copies[name]) for name, tensor in tensors.items()}

    def wait_for_staging(self) -> None:
        """Make the device wait for the copies before it runs anything that follows."""
        if self._copied is not None:
            torch.cuda.current_stream().wait_event(self._copied)

    def finish(self) -> None:
        """Wait until the copies are made."""
        if self._copied is not None:
            self._copied.synchronize()

    def _copy(self, name: str, local: Tensor) -> Tensor:
        if not self._pinned:
            return local.to("cpu", copy=True)
        kept = self._kept.get(name)
        if kept is None or kept.shape != local.shape or kept.dtype != local.dtype:
            kept = torch.empty(
                local.shape, dtype=local.dtype, device="cpu", pin_memory=local.is_cuda
            )
            self._kept[name] = kept
        return kept.copy_(local, non_blocking=local.is_cuda)

    def _side_stream(self, on_gpu: bool) -> Any:
        if not (self._pinned and on_gpu):
            return nullcontext()
        if self._stream is None:
            self._stream = torch.cuda.Stream()
        self._stream.wait_stream(torch.cuda.current_stream())
        return torch.cuda.stream(self._stream)
