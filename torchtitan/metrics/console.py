"""The console: one line per record, and a progress bar below the lines on a terminal.

Lines go through the logger, which knows the ranks to show. The training loop draws the bar itself,
at most a few times a second, because a thread would compete with it.
"""

import logging
import sys
import time
from typing import Any

from torchtitan.metrics.sinks import Record

logger = logging.getLogger(__name__)

_SECONDS_BETWEEN_DRAWS = 0.25
_COLORS = {
    "step": 31,
    "loss": 32,
    "grad_norm": 33,
    "lr": 33,
    "memory": 36,
    "tps": 34,
    "mfu": 35,
    "perplexity": 33,
}
"""ANSI colours by figure."""


class ConsoleSink:
    """Logs lines; `bar` adds a progress bar over `steps` steps; `color` colours both."""

    name = "the console"
    keeps_trying = False

    def __init__(self, steps: int, color: bool, bar: bool):
        self._steps = steps
        self._color = color
        self._bar = _ProgressBar(steps) if bar else None

    def resume(self, step: int) -> None:
        """Move the bar to `step`."""
        self.advance(step)

    def advance(self, step: int) -> None:
        """Move the bar to `step`. Cheap, because it is called at every step."""
        if self._bar is not None:
            self._bar.advance(step)

    def write(self, record: Record) -> None:
        """Log the record as a line, and show its loss and speed beside the bar."""
        width = len(str(self._steps))
        if "loss" not in record:
            logger.info(format_measures(record, width, self._color))
            return
        logger.info(format_line(record, width, self._color))
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


def format_line(record: Record, step_width: int = 1, color: bool = False) -> str:
    """Return the figures of a record as a line, rounded and with units."""
    memory = f"{record['memory_peak_gib']:.2f}GiB"
    if record.get("memory_peak_fraction") is not None:
        memory += f"({100 * record['memory_peak_fraction']:.1f}%)"
    figures = {
        "step": f"{record['step']:{step_width}d}",
        "loss": f"{record['loss']:8.4f}",
        "grad_norm": f"{record['grad_norm']:8.4f}",
        "lr": f"{record['lr']:.2e}",
        "memory": memory,
        "tps": f"{record['tokens_per_second']:,.0f}",
    }
    if record.get("mfu") is not None:
        figures["mfu"] = f"{100 * record['mfu']:.2f}%"
    return _line({name: f"{name}: {figure}" for name, figure in figures.items()}, color)


def format_measures(record: Record, step_width: int = 1, color: bool = False) -> str:
    """Return a validation set's loss and perplexity, or a task's metrics, as a line."""
    parts = {"step": f"step: {record['step']:{step_width}d}"}
    for key, value in record.items():
        figure = key.rpartition("/")[2]
        is_of_task = key.startswith("evaluation/")
        if is_of_task or figure in ("loss", "perplexity"):
            parts[key if is_of_task else figure] = (
                f"{key}: {value:.4f}" if value < 1e6 else f"{key}: {value:.4g}"
            )
    return _line(parts, color)


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
            TimeRemainingColumn,
        )

        columns: list[Any] = [
            TextColumn("step"),
            MofNCompleteColumn(),
            BarColumn(bar_width=None),
            TextColumn("{task.fields[figures]}"),
            TimeElapsedColumn(),
            TextColumn("left"),
            TimeRemainingColumn(),
        ]
        self._progress = Progress(
            *columns,
            console=Console(stderr=True, soft_wrap=True),
            auto_refresh=False,
            # Output that goes to a file must not end up on the terminal instead.
            redirect_stdout=sys.stdout.isatty(),
        )
        self._task = self._progress.add_task("", total=steps, figures="")
        self._drawn = 0.0
        self._progress.start()

    def advance(self, step: int) -> None:
        self._progress.update(self._task, completed=step)
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
