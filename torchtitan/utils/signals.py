"""Requests to stop, by signals."""

import signal
from types import FrameType
from typing import Any

STOP_SIGNALS = (signal.SIGTERM, signal.SIGINT, signal.SIGHUP, signal.SIGUSR1)
"""Schedulers send SIGTERM, or SIGUSR1 if a job asks for it, some time before they kill; a closed
terminal sends SIGHUP, and Ctrl-C SIGINT."""


class StopRequested(BaseException):
    """The process was asked to stop before its first step. Exit status 7."""


class StopRequest:
    """A context in which the signals above set `requested`, for the training loop to stop in time.

    A second Ctrl-C sets `interrupted` and raises KeyboardInterrupt at once. `at_once`, for the time
    before the loop: the first signal raises StopRequested, or KeyboardInterrupt for Ctrl-C. A
    SIGHUP that nohup makes this process ignore stays ignored. Enter it on the main thread.
    """

    def __init__(self, at_once: bool = False) -> None:
        self.at_once = at_once
        self.requested = False
        self.interrupted = False
        self._previous: dict[int, Any] = {}

    def __enter__(self) -> "StopRequest":
        for number in STOP_SIGNALS:
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
            signal.signal(number, handler)
