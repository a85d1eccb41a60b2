"""Being asked to stop."""

import signal
from types import FrameType, TracebackType
from typing import Any


class StopRequest:
    """While entered, SIGTERM only sets `requested`; whoever is in charge then stops when it can.

    Schedulers send SIGTERM some time before they kill. Entered on the main thread only.
    """

    def __init__(self) -> None:
        self.requested = False
        self._previous: Any = None

    def __enter__(self) -> "StopRequest":
        self._previous = signal.signal(signal.SIGTERM, self._on_signal)
        return self

    def _on_signal(self, number: int, frame: FrameType | None) -> None:
        self.requested = True

    def __exit__(
        self,
        kind: type[BaseException] | None,
        error: BaseException | None,
        traceback: TracebackType | None,
    ) -> None:
        signal.signal(signal.SIGTERM, self._previous)
