"""Watchdog: ends this rank if it gets stuck, and says where it was.

Python code and signal handlers do not run while a thread holds the interpreter's lock, so the one
that watches is a process of its own (`hang_report.py`). It is started by its path, without torch.
"""

import ctypes
import faulthandler
import logging
import mmap
import os
import signal
import subprocess
import sys
import tempfile
import time
import traceback
from contextlib import suppress
from pathlib import Path
from types import TracebackType
from typing import Any

from torchtitan.distributed import hang_report
from torchtitan.distributed.hang_report import ENDING, PAGE, SIGN, START_OF_SIGN, STARTUP, Sign
from torchtitan.utils.torch_compat import lost_contact

logger = logging.getLogger(__name__)


class Watchdog:
    """Signs of life of this rank, for the process that watches it once `start` was called.

    Enter it around all that is watched. After an error it watches until the process ends.
    """

    def __init__(self, rank: int = 0, world_size: int = 1, timeout_seconds: float = 0.0):
        self._rank, self._world_size = rank, world_size
        self._number, self._step, self._phase = 0, 0, STARTUP
        self._timeout = timeout_seconds
        self._time = time.monotonic()
        """Time of the last sign before the end."""
        self._ends = False
        self._place = ""
        self._descriptor = -1
        self._page: mmap.mmap | None = None
        self._process: subprocess.Popen[bytes] | None = None
        self._dumped_before = False

    def start(self, folder: Path, start: int) -> None:
        """Watch from here on; `folder`, that of the run, gets the report.

        `start` is a number that only the ranks of this start have.
        """
        self._place = str(folder / hang_report.RECORDS_NAME / str(start))
        words = [sys.executable, "-I", "-S", hang_report.__file__, self._place]
        try:
            self._descriptor = descriptor = _shared_file()
            os.truncate(descriptor, PAGE)
            os.lseek(descriptor, PAGE, os.SEEK_SET)  # faulthandler writes behind the signs
            self._page = mmap.mmap(descriptor, PAGE)
            self.sign()
            words += map(str, (self._rank, self._world_size, os.getpid(), descriptor))
            self._process = subprocess.Popen(
                words,
                stdin=subprocess.PIPE,
                stdout=subprocess.DEVNULL,
                pass_fds=[descriptor],
                start_new_session=True,  # no signal that a terminal sends to all reaches it
            )
        except OSError as error:
            logger.warning("no watchdog, so a rank that gets stuck does not end: %s", error)
            return
        self._dumped_before = faulthandler.is_enabled()
        _react_to_signals(descriptor)

    def sign(
        self, phase: str | None = None, step: int | None = None, timeout: float | None = None
    ) -> None:
        """Give a sign of life; `step`: the finished ones, `timeout`: that of collectives now."""
        if self._ends:
            return
        self._phase = self._phase if phase is None else phase
        self._step = self._step if step is None else step
        self._timeout = self._timeout if timeout is None else timeout
        self._write(self._phase)

    def wait(self, waiting: bool) -> None:
        """Give a sign before this rank waits in a collective, and after it."""
        self._number += 1
        self._time = time.monotonic()
        if self._page is not None:
            START_OF_SIGN.pack_into(self._page, 0, self._number, waiting)

    def end(self) -> None:
        """Say that this rank ends, which may take long: it may save, or wait for other ranks."""
        last = self._time
        self._write(ENDING)
        self._time, self._ends = last, True

    def _write(self, phase: str) -> None:
        self._number += 1
        self._time = time.monotonic()
        if self._page is not None:
            fields = self._number, False, self._step, self._timeout, phase.encode()
            SIGN.pack_into(self._page, 0, *fields)

    def found_hang(self) -> bool:
        """Return True if any rank has left a record, which ends the run as a hang."""
        return bool(self._place) and hang_report.has_records(self._place)

    def report(self) -> str:
        """Write the report from all ranks' records; return a line on it."""
        try:
            headline = hang_report.merge(self._place, self._world_size)
        except (OSError, ValueError) as error:  # a record may be damaged
            return f"No report of it, as {hang_report.REPORT_NAME} cannot be written: {error}"
        folder = hang_report.folder_of(self._place)
        return f"{headline}. All stacks: {os.path.join(folder, hang_report.REPORT_NAME)}"

    def __enter__(self) -> "Watchdog":
        return self

    def __exit__(
        self,
        kind: type[BaseException] | None,
        error: BaseException | None,
        trace: TracebackType | None,
    ) -> None:
        if error is None:
            self.close()
            return
        self.end()
        if self._page is not None and lost_contact(error) == "timeout":
            stacks = "".join(traceback.format_exception(error))
            self._record(time.monotonic() - self._time, stacks)

    def _record(self, seconds: float, stacks: str) -> None:
        sign = Sign(self._number, True, self._step, self._timeout, self._phase)
        try:
            hang_report.write_record(
                self._place, self._rank, os.getpid(), sign, seconds, "waited", stacks
            )
        except OSError as error:
            logger.warning("%s cannot be written: %s", hang_report.REPORT_NAME, error)

    def close(self) -> None:
        """Stop watching, whatever the end was: this process goes on with something else."""
        if self._process is not None:
            faulthandler.disable()
            faulthandler.unregister(hang_report.DUMP)
            # C's function: Python's works on the main thread only.
            _signal_function()(signal.SIGABRT, int(signal.SIG_DFL))
            if self._dumped_before and sys.__stderr__ is not None:
                faulthandler.enable(sys.__stderr__)
            self._process.kill()
            self._process.communicate()
        if self._page is not None:
            self._page.close()
            os.close(self._descriptor)
        self._page = self._process = None


def _shared_file() -> int:
    """Return the descriptor of a file without a name, in memory where the system can."""
    with suppress(AttributeError, OSError):  # not on every system, nor in every sandbox
        return os.memfd_create("watchdog")
    with tempfile.TemporaryFile() as file:
        return os.dup(file.fileno())


def _react_to_signals(descriptor: int) -> None:
    """Let `DUMP` write the stacks of all threads to a file, and SIGABRT end the process, too.

    With status 6: faulthandler's handler of SIGABRT calls the one that it found, C's `_exit`, with
    the signal's number. None of this needs the interpreter's lock.
    """
    assert signal.SIGABRT == hang_report.HANG
    leave = ctypes.cast(ctypes.CDLL(None)._exit, ctypes.c_void_p)
    faulthandler.disable()  # else it would not install its handler again
    _signal_function()(signal.SIGABRT, leave)
    faulthandler.enable(descriptor)
    faulthandler.register(hang_report.DUMP, descriptor)


def _signal_function() -> Any:
    """Return the C library's `signal`."""
    function = ctypes.CDLL(None).signal
    function.argtypes = [ctypes.c_int, ctypes.c_void_p]
    function.restype = ctypes.c_void_p
    return function
