"""Log many processes as one.

Messages of interest once are logged by every rank at INFO, and shown by rank 0 (or the ranks that
`LOG_RANK` lists, as `LOG_RANK=0,3`). Warnings and errors are shown by each rank, with its number.
"""

import logging
import os
import sys
from collections.abc import Collection
from typing import TextIO


def ranks_to_show(environment: str | None = None) -> frozenset[int]:
    """Return the ranks that `LOG_RANK` (or `environment`) lists; rank 0 by default."""
    text = os.environ.get("LOG_RANK", "") if environment is None else environment
    listed = frozenset(int(word) for word in text.split(",") if word.strip().isdigit())
    return listed or frozenset({0})


def init_logging(
    rank: int, log_ranks: Collection[int] | None = None, in_process: bool = False
) -> None:
    """Send the messages of `torchtitan` to stderr: all if `rank` is shown, else from warnings up.

    `log_ranks`: the ranks shown, instead of those of `LOG_RANK`. A second call replaces the first.
    `in_process`: in a program of somebody else, whose handlers of the root logger, if there are
    any, show the messages instead.
    """
    shown = ranks_to_show() if log_ranks is None else log_ranks
    logger = logging.getLogger("torchtitan")
    for handler in list(logger.handlers):
        if isinstance(handler, _CurrentStderrHandler):
            logger.removeHandler(handler)
    if not (in_process and logging.root.handlers):
        handler = _CurrentStderrHandler()
        handler.setFormatter(_RankFormatter(rank, several=len(shown) > 1))
        logger.addHandler(handler)
    # The level, not a filter, so that `isEnabledFor` spares hidden ranks the work.
    logger.setLevel(logging.INFO if rank in shown else logging.WARNING)


class _CurrentStderrHandler(logging.StreamHandler):  # type: ignore[type-arg]
    """Writes to what `sys.stderr` is now, so that lines go above a progress bar, not through it."""

    def __init__(self) -> None:
        logging.Handler.__init__(self)

    @property
    def stream(self) -> TextIO:  # type: ignore[override]
        return sys.stderr


class _RankFormatter(logging.Formatter):
    """Time and message; the rank wherever a reader could be in doubt about it."""

    def __init__(self, rank: int, several: bool):
        super().__init__("%(asctime)s %(message)s", datefmt="%H:%M:%S")
        self._rank = rank
        self._several = several

    def formatMessage(self, record: logging.LogRecord) -> str:
        notable = record.levelno >= logging.WARNING
        prefix = f"[rank {self._rank}] " if notable or self._several else ""
        level = f"{record.levelname}: " if notable else ""
        return f"{record.asctime} {prefix}{level}{record.message}"
