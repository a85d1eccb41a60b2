"""Tables, JSON, and the progress of long tasks, as commands print them. No torch."""

import math
import sys
import time
from collections.abc import Sequence
from typing import Any

from torchtitan.utils.text import format_bytes

_SECONDS_BETWEEN_LINES = 5.0


class Progress:
    """Prints how far a long task is, every few seconds. Threads may share it."""

    def __init__(self, what: str, total: int):
        self._what, self._total, self._done = what, total, 0
        self._printed = time.monotonic()

    def add(self, num_bytes: int) -> None:
        """Count further bytes."""
        self._done += num_bytes
        if time.monotonic() - self._printed > _SECONDS_BETWEEN_LINES:
            self._printed = time.monotonic()
            done, total = format_bytes(self._done), format_bytes(self._total)
            print(f"{self._what}: {done} of {total}", file=sys.stderr, flush=True)


def aligned(rows: Sequence[Sequence[str]]) -> list[str]:
    """Return rows as aligned lines."""
    widths = [max(map(len, column)) for column in zip(*rows)]
    lines = ("  ".join(text.ljust(width) for text, width in zip(row, widths)) for row in rows)
    return [line.rstrip() for line in lines]


def json_values(value: Any) -> Any:
    """Return the value with None for each number that is not finite, which JSON does not have."""
    if isinstance(value, dict):
        return {key: json_values(each) for key, each in value.items()}
    if isinstance(value, list | tuple):
        return [json_values(each) for each in value]
    return None if isinstance(value, float) and not math.isfinite(value) else value
