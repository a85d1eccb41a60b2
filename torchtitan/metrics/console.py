"""The console: one line per record, and a progress bar below the lines on a terminal.

Lines go through the logger, which knows the ranks to show. The training loop draws the bar itself,
at most a few times a second, because a thread would compete with it. The time left stands in one
place: beside the bar, or without one at the end of each line.
"""

import logging
import sys
import time
from collections import deque
from collections.abc import Callable
from typing import Any

from torchtitan.metrics.sinks import Record
from torchtitan.utils.text import format_duration

logger = logging.getLogger(__name__)

_SECONDS_BETWEEN_DRAWS = 0.25
_RECENT_STEPS = 100
"""Steps whose speed the time left is estimated by."""
_COLORS = {
    "step": 31,
    "loss": 32,
    "grad_norm": 33,
    "lr": 33,
    "memory": 36,
    "tps": 34,
    "mfu": 35,
    "perplexity": 33,
    "eta": 36,
}
"""ANSI colours by figure."""


class Pace:
    """The recent speed of this start. `clock` returns seconds.

    The first step of a start, which compiles and connects, is left out.
    """

    def __init__(self, steps: int, clock: Callable[[], float] = time.perf_counter):
        self._steps = steps
        self._clock = clock
        self._ends: deque[tuple[int, float]] = deque(maxlen=_RECENT_STEPS + 1)

    def advance(self, step: int) -> None:
        """Note the end of `step`."""
        self._ends.append((step, self._clock()))

    def eta(self) -> str:
        """Return the time left, such as `3m12s`; empty before the second step and at the end."""
        if len(self._ends) < 2 or self._ends[-1][0] >= self._steps:
            return ""
        (first, start), (last, end) = self._ends[0], self._ends[-1]
        return format_duration((end - start) / (last - first) * (self._steps - last))


class ConsoleSink:
    """Logs lines; `bar` adds a progress bar over `steps` steps; `color` colours the lines."""

    name = "the console"
    keeps_trying = False

    def __init__(
        self, steps: int, color: bool, bar: bool, clock: Callable[[], float] = time.perf_counter
    ):
        self._steps = steps
        self._color = color
        self._bar = _ProgressBar(steps) if bar else None
        self._pace = Pace(steps, clock)

    def resume(self, step: int) -> None:
        """Move the bar to `step`."""
        if self._bar is not None:
            self._bar.advance(step)

    def advance(self, step: int) -> None:
        """Note the end of `step`. Cheap, because it is called at every step."""
        self._pace.advance(step)
        if self._bar is not None:
            self._bar.advance(step, self._pace.eta())

    def write(self, record: Record) -> None:
        """Log the record as a line, and show its loss and speed beside the bar."""
        if "loss" not in record:
            logger.info(format_measures(record, self._steps, self._color))
            return
        eta = "" if self._bar is not None else self._pace.eta()
        logger.info(format_line(record, self._steps, self._color, eta))
        if self._bar is not None:
            self._bar.show(f"loss {record['loss']:.4f}  {record['tokens_per_second']:,.0f} tok/s")

    def flush(self) -> None:
        """Do nothing: lines are written at once."""

    def close(self, failed: bool = False) -> None:
        """End the bar."""
        if self._bar is not None:
            self._bar.close()


def is_terminal() -> bool:
    """Return True if stderr, where the log goes, is a terminal."""
    return sys.stderr.isatty()


def format_line(record: Record, steps: int, color: bool = False, eta: str = "") -> str:
    """Return the figures of a record as a line, rounded and with units.

    The names are those of TorchTitan's lines, which scripts read. `steps`: of the whole run.
    """
    memory = f"{record['memory_peak_gib']:.2f}GiB"
    if record.get("memory_peak_fraction") is not None:
        memory += f"({100 * record['memory_peak_fraction']:.1f}%)"
    figures = {
        "step": _of_all(record, steps),
        "loss": f"{record['loss']:8.4f}",
        "grad_norm": f"{record['grad_norm']:8.4f}",
        "lr": f"{record['lr']:.2e}",
        "memory": memory,
        "tps": f"{record['tokens_per_second']:,.0f}",
    }
    if record.get("mfu") is not None:
        figures["mfu"] = f"{100 * record['mfu']:.2f}%"
    parts = {name: f"{name}: {figure}" for name, figure in figures.items()}
    if eta:
        parts["eta"] = f"eta {eta}"
    return _line(parts, color)


def format_measures(record: Record, steps: int, color: bool = False) -> str:
    """Return a validation set's loss and perplexity, or a task's metrics, as a line."""
    parts = {"step": f"step: {_of_all(record, steps)}"}
    for key, value in record.items():
        figure = key.rpartition("/")[2]
        is_of_task = key.startswith("evaluation/")
        if is_of_task or figure in ("loss", "perplexity"):
            parts[key if is_of_task else figure] = (
                f"{key}: {value:.4f}" if value < 1e6 else f"{key}: {value:.4g}"
            )
    return _line(parts, color)


def _of_all(record: Record, steps: int) -> str:
    return f"{record['step']:{len(str(steps))}d}/{steps}"


def _line(parts: dict[str, str], color: bool) -> str:
    if not color:
        return "  ".join(parts.values())
    return "  ".join(f"\x1b[{_COLORS.get(name, 32)}m{part}\x1b[0m" for name, part in parts.items())


class _ProgressBar:
    """rich's bar on stderr. Other writes to the terminal appear above it."""

    def __init__(self, steps: int):
        from rich.console import Console
        from rich.progress import (
            BarColumn,
            MofNCompleteColumn,
            Progress,
            TextColumn,
            TimeElapsedColumn,
        )

        columns: list[Any] = [
            TextColumn("step"),
            MofNCompleteColumn(),
            BarColumn(bar_width=None),
            TextColumn("{task.fields[figures]}"),
            TimeElapsedColumn(),
            # Not rich's estimate, which takes a resume for steps that took no time.
            TextColumn("{task.fields[eta]}"),
        ]
        self._progress = Progress(
            *columns,
            console=Console(stderr=True, soft_wrap=True),
            auto_refresh=False,
            # Output that goes to a file must not end up on the terminal instead.
            redirect_stdout=sys.stdout.isatty(),
        )
        self._task = self._progress.add_task("", total=steps, figures="", eta="")
        self._drawn = 0.0
        self._progress.start()

    def advance(self, step: int, eta: str = "") -> None:
        self._progress.update(self._task, completed=step, eta=eta and f"eta {eta}")
        self._draw_if_due()

    def show(self, figures: str) -> None:
        self._progress.update(self._task, figures=figures)
        self._draw_if_due()

    def close(self) -> None:
        self._progress.refresh()
        self._progress.stop()

    def _draw_if_due(self) -> None:
        now = time.monotonic()
        if now - self._drawn >= _SECONDS_BETWEEN_DRAWS:
            self._drawn = now
            self._progress.refresh()
