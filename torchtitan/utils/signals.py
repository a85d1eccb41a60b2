"""Being asked to stop."""

import signal
from types import FrameType
from typing import Any

STOP_SIGNALS = (signal.SIGTERM, signal.SIGINT, signal.SIGHUP, signal.SIGUSR1)
"""Schedulers send SIGTERM, or SIGUSR1 where a job asks for it, some time before they kill; a
terminal that is closed sends SIGHUP, and Ctrl-C SIGINT."""


class StopRequest:
    """While entered, the signals above only set `requested`; whoever is in charge stops in time.

    Whoever presses Ctrl-C a second time does not want to wait: that sets `interrupted` and raises
    KeyboardInterrupt at once. A SIGHUP that this process was started to ignore, by nohup, stays
    ignored. To be entered on the main thread.
    """

    def __init__(self) -> None:
        self.requested = False
        self.interrupted = False
        self._previous: dict[int, Any] = {}

    def __enter__(self) -> "StopRequest":
        for number in STOP_SIGNALS:
            if number != signal.SIGHUP or signal.getsignal(number) != signal.SIG_IGN:
                self._previous[number] = signal.signal(number, self._on_signal)
        return self

    def _on_signal(self, number: int, frame: FrameType | None) -> None:
        if self.requested and number == signal.SIGINT:
            self.interrupted = True
            raise KeyboardInterrupt
        self.requested = True

    def __exit__(self, *details: object) -> None:
        for number, handler in self._previous.items():
            signal.signal(number, handler)
