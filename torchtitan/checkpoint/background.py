"""One save at a time on a thread of its own, whose failure nobody can miss.

The thread belongs to the process: it dies with it (an orphan that went on writing could race a
restarted job), and the process does not end before it. An error is kept until `wait` raises it.
"""

import logging
import os
import sys
import threading
import time
from collections.abc import Callable
from contextlib import suppress

from torchtitan.config import CheckpointError

logger = logging.getLogger(__name__)

_WORTH_A_LINE_SECONDS = 0.05
_NICENESS = 10
"""About a tenth of a core that a step wants as well; all of one that is free. With the lowest
priority, 19, a save on a busy machine would not end in time for the next one."""


class Background:
    """Runs an action on a thread; `wait` comes before the next one."""

    def __init__(self) -> None:
        self._thread: threading.Thread | None = None
        self._error: BaseException | None = None
        self._step = -1

    def start(self, step: int, action: Callable[[], None]) -> None:
        """Begin to save `step`; returns at once."""
        assert self._thread is None, "wait() comes first: never two saves at a time"
        self._step = step
        self._thread = threading.Thread(target=self._run, args=(action,), name=f"save-{step}")
        self._thread.start()

    @property
    def failed(self) -> bool:
        """Whether the last action has failed and `wait` has not told yet."""
        return self._error is not None

    def wait(self) -> None:
        """Return when nothing is being saved. Raises the error of what was, once, as
        `CheckpointError`."""
        thread, self._thread = self._thread, None
        if thread is None:
            return
        if thread.is_alive():
            started = time.monotonic()
            thread.join()
            seconds = time.monotonic() - started
            if seconds > _WORTH_A_LINE_SECONDS:
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
            _yield_to_training()
            action()
        except BaseException as error:  # DCP's exceptions are none of `Exception`
            self._error = error


def _yield_to_training() -> None:
    """Lower the priority of this thread: on a CPU steps want all cores, and wait for the slowest.
    Linux has priorities of threads, and derives those of the disk from them. It is never raised,
    which few may do: `nice` may have started the run with a lower one."""
    if sys.platform != "linux":
        return
    thread = threading.get_native_id()
    with suppress(OSError):  # a container may forbid it
        niceness = max(_NICENESS, os.getpriority(os.PRIO_PROCESS, thread))
        os.setpriority(os.PRIO_PROCESS, thread, niceness)
