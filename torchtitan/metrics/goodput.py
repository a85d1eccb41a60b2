"""Goodput: where the wall time of a run goes.

Every moment is booked on exactly one activity, so the shares add up to 1: `startup` until the first
step waits for its data, `compute` in the loop, and within it whatever is timed under another name
(`data`, `checkpoint`, ...). Time is the host's: a GPU may still work while the host waits for data.

A run may take several starts. Each continues from the totals of the earlier ones, read from their
records; time spent on steps after the resumed one is `lost`.
"""

import json
from collections import defaultdict
from collections.abc import Callable, Iterator, Mapping
from contextlib import contextmanager
from pathlib import Path
from typing import Any

from torchtitan.utils.text import format_duration, plural

STARTUP, DATA, COMPUTE, CHECKPOINT, LOST = "startup", "data", "compute", "checkpoint", "lost"
TOTAL_KEY = "run_seconds"
SHARE_PREFIX = "time_share/"


class TimeSplit:
    """Books time on activities. `clock` returns seconds; `seconds_before` have passed already."""

    def __init__(self, clock: Callable[[], float], seconds_before: float = 0.0):
        self._clock = clock
        self._booked_until = clock()
        self._activities = [STARTUP]
        self._earlier = 0.0
        self._seconds: dict[str, float] = defaultdict(float)
        # In every record, even at 0.
        self._seconds |= {STARTUP: seconds_before, DATA: 0.0, COMPUTE: 0.0, CHECKPOINT: 0.0}

    def start_training(self) -> None:
        """Book what follows as `compute` unless it is `spent` otherwise."""
        self._book()
        self._activities = [COMPUTE]

    @contextmanager
    def spent(self, activity: str) -> Iterator[None]:
        """Book the time within on `activity`, except time spent on a nested one."""
        self._book()
        self._activities.append(activity)
        try:
            yield
        finally:
            self._book()
            self._activities.pop()

    @property
    def activity(self) -> str:
        """The one that time is booked on now."""
        return self._activities[-1]

    def add(self, seconds: Mapping[str, float]) -> None:
        """Add the seconds of earlier starts of the run."""
        for activity, part in seconds.items():
            self._seconds[activity] += part
            self._earlier += part

    def record(self) -> dict[str, float]:
        """Return the seconds of the run over all its starts, and the share of each activity."""
        self._book()
        total = sum(self._seconds.values())
        shares = {SHARE_PREFIX + name: part / total for name, part in self._seconds.items()}
        return {TOTAL_KEY: total, **shares}

    def describe(self, first_step: int, step: int) -> str:
        """Describe in a line what this start, after `first_step`, and all starts took to `step`.

        The shares are those of all starts: the largest first, without those of 0.0%.
        """
        self._book()
        total = sum(self._seconds.values())
        text = f"Trained {_steps_in(step - first_step, total - self._earlier)}"
        if self._earlier:
            text += f" in this start, {_steps_in(step, total)} in all"
        parts = [
            f"{100 * part / total:.1f}% {'start-up' if name == STARTUP else name}"
            for name, part in sorted(self._seconds.items(), key=lambda item: -item[1])
            if part / total >= 0.0005
        ]
        return f"{text}: {', '.join(parts)}"

    def _book(self) -> None:
        now = self._clock()
        self._seconds[self._activities[-1]] += now - self._booked_until
        self._booked_until = now


def _steps_in(steps: int, seconds: float) -> str:
    return f"{plural(steps, 'step')} in {format_duration(seconds)}"


def earlier_seconds(path: Path, step: int) -> dict[str, float]:
    """Return the seconds of each activity in earlier starts, from the records in `path`.

    This start continues after `step`; time in the records of later steps is `lost`.
    """
    kept: dict[str, float] = {}
    latest: dict[str, float] = {}
    for record in _records(path):
        latest = _seconds(record)
        if record["step"] <= step:
            kept = latest
    lost = sum(latest.values()) - sum(kept.values())
    return {**kept, LOST: kept.get(LOST, 0.0) + lost} if lost > 0 else kept


def _records(path: Path) -> Iterator[dict[str, Any]]:
    """Yield complete records; a process may have died while it wrote the last one."""
    for line in path.read_bytes().splitlines():
        try:
            record = json.loads(line)
            if isinstance(record["step"], int) and isinstance(record[TOTAL_KEY], float):
                yield record
        except (ValueError, KeyError, TypeError):
            continue


def _seconds(record: Mapping[str, Any]) -> dict[str, float]:
    shares = {key: value for key, value in record.items() if key.startswith(SHARE_PREFIX)}
    total = record[TOTAL_KEY]
    return {key.removeprefix(SHARE_PREFIX): share * total for key, share in shares.items()}
