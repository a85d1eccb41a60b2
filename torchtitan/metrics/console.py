"""The console: a line a record, and on a terminal a progress bar below the lines.

Lines go through the logger, which knows the ranks to show. The bar is drawn by the training loop
itself, at most a few times a second, rather than by a thread that would compete with it.
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
"""ANSI colour of each figure."""


class ConsoleSink:
    """Lines by the logger; `bar` adds the progress bar over `steps` steps; `color` colours both."""

    name = "the console"
    keeps_trying = False

    def __init__(self, steps: int, color: bool, bar: bool):
        self._steps = steps
        self._color = color
        self._bar = _ProgressBar(steps) if bar else None

    def resume(self, step: int) -> None:
        self.advance(step)

    def advance(self, step: int) -> None:
        """Step `step` is done. Cheap: it is called at every step."""
        if self._bar is not None:
            self._bar.advance(step)

    def write(self, record: Record) -> None:
        width = len(str(self._steps))
        if "loss" not in record:
            logger.info(format_validation(record, width, self._color))
            return
        logger.info(format_line(record, width, self._color))
        if self._bar is not None:
            self._bar.show(f"loss {record['loss']:.4f}  {record['tokens_per_second']:,.0f} tok/s")

    def flush(self) -> None:
        pass

    def close(self, failed: bool = False) -> None:
        if self._bar is not None:
            self._bar.close()


def is_terminal() -> bool:
    """Whether someone watches: stderr, where the log goes, is a terminal that can redraw."""
    return sys.stderr.isatty()


def format_line(record: Record, step_width: int = 1, color: bool = False) -> str:
    """The figures of a record for people: rounded, with units."""
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


def format_validation(record: Record, step_width: int = 1, color: bool = False) -> str:
    """Loss and perplexity of a validation set for people, under the names of the metrics."""
    words = {"step": f"step: {record['step']:{step_width}d}"}
    for key, value in record.items():
        figure = key.rpartition("/")[2]
        if figure in ("loss", "perplexity"):
            words[figure] = f"{key}: {value:.4f}" if value < 1e6 else f"{key}: {value:.4g}"
    return _line(words, color)


def _line(words: dict[str, str], color: bool) -> str:
    """The words in a row, each in the colour of its figure."""
    if not color:
        return "  ".join(words.values())
    return "  ".join(f"\x1b[{_COLORS[name]}m{word}\x1b[0m" for name, word in words.items())


class _ProgressBar:
    """rich's bar on stderr. While it lives, other writes to the terminal appear above it."""

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
