"""Stop with a signal, or with the process that started this one. No torch."""

import logging
import multiprocessing
import os
import select
import signal
import threading
import time
from functools import cache
from multiprocessing import connection
from pathlib import Path
from types import FrameType
from typing import Any

from torchtitan.utils.host import seconds_since_start

logger = logging.getLogger(__name__)

STOP_SIGNALS = (signal.SIGTERM, signal.SIGINT, signal.SIGHUP, signal.SIGUSR1)
"""Schedulers send SIGTERM, or SIGUSR1 if a job asks for it, some time before they kill; a closed
terminal sends SIGHUP, and Ctrl-C SIGINT."""


_SHARE_OF_FIRST_SAVE = 0.05
"""Seconds of a time limit, kept for a save as long as none has been timed."""


class StopRequested(BaseException):
    """A request to stop before the first step. Exit status 7."""


class StopRequest:
    """A context in which the signals above set `requested`, for the training loop to stop in time.

    A second Ctrl-C sets `interrupted` and raises KeyboardInterrupt at once. `at_once`, for the time
    before the loop: the first signal raises StopRequested, or KeyboardInterrupt for Ctrl-C. A
    SIGHUP that nohup makes this process ignore stays ignored. Only the main thread may handle
    signals: on another one none is set up.

    A file and a time limit, of which `watch` tells it, are looked at by `poll`.
    """

    def __init__(self, at_once: bool = False) -> None:
        self.at_once = at_once
        self.requested = False
        self.interrupted = False
        self.out_of_time = False
        """The time limit is why a stop is requested."""
        self.step_seconds = 0.0
        """Duration of a step: two more of them end before the time limit."""
        self.save_seconds = 0.0
        """Duration of a save, which ends before the time limit, too."""
        self._file: Path | None = None
        self._limit: float | None = None
        self._previous: dict[int, Any] = {}

    def watch(self, file: Path | None, limit_seconds: float | None) -> None:
        """Let `poll` look for `file`, and for the end of the process's `limit_seconds`."""
        self._file, self._limit = file, limit_seconds
        if limit_seconds is not None:
            self.save_seconds = limit_seconds * _SHARE_OF_FIRST_SAVE

    def expect_save(self, seconds: float) -> None:
        """Take the last save as the measure of the next one."""
        self.save_seconds = seconds

    def poll(self) -> bool:
        """Return True, from the first reason on, if the run has to stop."""
        if not self.requested and self._file is not None and self._file.exists():
            logger.warning("Asked to stop by the file %s", self._file)
            self.requested = True
        if not self.requested and self._limit is not None:
            needed = 2 * self.step_seconds + self.save_seconds
            if seconds_since_start() + needed >= self._limit:
                text = "training.max_seconds = %g: stopping, as a save may take %.1f s"
                logger.warning(text, self._limit, self.save_seconds)
                self.requested = self.out_of_time = True
        return self.requested

    def __enter__(self) -> "StopRequest":
        on_main_thread = threading.current_thread() is threading.main_thread()
        for number in STOP_SIGNALS if on_main_thread else ():
            if number != signal.SIGHUP or signal.getsignal(number) != signal.SIG_IGN:
                self._previous[number] = signal.signal(number, self._on_signal)
        return self

    def _on_signal(self, number: int, frame: FrameType | None) -> None:
        if number == signal.SIGINT and (self.requested or self.at_once):
            self.interrupted = True
            raise KeyboardInterrupt
        self.requested = True
        if self.at_once:
            raise StopRequested

    def __exit__(self, *details: object) -> None:
        for number, handler in self._previous.items():
            # None is a handler that was not set from Python.
            signal.signal(number, signal.SIG_DFL if handler is None else handler)
        self._previous = {}


_LAUNCHER_MARKS = ("TORCHELASTIC_RUN_ID", "OMPI_COMM_WORLD_RANK", "PMI_RANK")
"""Variables that a launcher sets in what it starts, and does not have itself."""
_GRACE_SECONDS = 300
"""For saving, once the launcher is gone: as long as ranks wait for each other in a save."""


def worker_context(*preload: str) -> Any:
    """Return the `multiprocessing` context of workers, which have imported `preload`."""
    if "forkserver" not in multiprocessing.get_all_start_methods():
        return multiprocessing.get_context("spawn")
    context = multiprocessing.get_context("forkserver")
    if preload:
        context.set_forkserver_preload(list(preload))
    return context


def end_with_parent() -> None:
    """End this child of `multiprocessing` when its parent does, even a killed one.

    By process id its parent is the fork server, which lives longer; the kernel's parent-death
    signal and DataLoader's watchdog look at that one only.
    """
    threading.Thread(target=_wait_for_parent, daemon=True).start()


def _wait_for_parent() -> None:
    parent = multiprocessing.parent_process()
    assert parent is not None
    connection.wait([parent.sentinel])
    os._exit(1)


@cache
def end_with_launcher() -> None:
    """Send this process SIGTERM when the torchrun or mpirun that started it is gone.

    Ranks of a killed launcher would train on, and hold the run folder's lock. A rank that has not
    ended some time after that is killed. Does nothing for a process that no launcher started, nor
    when it is called again.
    """
    launcher = _launcher()
    if launcher is not None:
        threading.Thread(target=_stop_after, args=(launcher,), daemon=True).start()


def _launcher() -> int | None:
    """Return the launcher's process id: the nearest ancestor without the variables that it sets.

    Its child may be a script of the user's, which does not end with it.
    """
    names = [name for name in _LAUNCHER_MARKS if name in os.environ]
    if not names:
        return None
    mark, process = f"{names[0]}={os.environ[names[0]]}", os.getppid()
    try:
        while mark.encode() in Path(f"/proc/{process}/environ").read_bytes().split(b"\0"):
            process = int(Path(f"/proc/{process}/stat").read_text().rpartition(")")[2].split()[1])
    except OSError:
        pass  # without /proc, or of another user: then that is the one
    return process


def _stop_after(process: int) -> None:
    _wait_for_end(process)
    logger.warning("The launcher (process %d) is gone; this rank saves and leaves", process)
    # The kernel's to send: it comes even if this interpreter is stuck by then.
    signal.alarm(_GRACE_SECONDS)
    os.kill(os.getpid(), signal.SIGTERM)


def _wait_for_end(process: int) -> None:
    try:
        descriptor = os.pidfd_open(process)
    except ProcessLookupError:
        return
    except (AttributeError, OSError):  # not Linux, or before 5.3
        parent = os.getppid()
        while os.getppid() == parent:
            time.sleep(1)
        return
    poll = select.poll()
    poll.register(descriptor, select.POLLIN)
    poll.poll()
