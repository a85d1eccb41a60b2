"""The reading of rows: the row that a process is at, and reads that fail for a moment.

A file system or a server that does not answer for a moment must not end a run of days. So a failed
read is tried again, from the row where it failed: no row is left out or given twice.
"""

import itertools
import logging
import struct
import time
from collections.abc import Callable, Iterator
from typing import Any, NamedTuple, TypeVar

from torchtitan.config import DataError
from torchtitan.data.decode import transient_cause
from torchtitan.data.files import FileSource
from torchtitan.data.pieces import Shard
from torchtitan.data.sources import Row, Source

logger = logging.getLogger(__name__)
T = TypeVar("T")

FIRST_PAUSE_SECONDS = 1.0
"""The pause before the first new try; each is twice as long as the one before, for a while."""
_LONGEST_PAUSE = 64
"""As a multiple of the first one."""


class Place(NamedTuple):
    """The place that a process has read up to."""

    source: int = 0
    """Number among the sources of a mixture."""
    shard: int = 0
    row: int = 0
    """`Row.place` of the next row, about; 0 at the beginning of the shard."""
    is_reading: bool = False
    """True while that row is being read."""


_FORM = struct.Struct("3q?")
PLACE_BYTES = 32
"""Bytes of shared memory for the place of one process."""


class Reading:
    """The place of this process, in memory that another one may look at."""

    def __init__(self) -> None:
        self._memory: Any = bytearray(PLACE_BYTES)

    def share(self, memory: memoryview) -> None:
        """Keep the place in `memory`, of `PLACE_BYTES`, from now on."""
        self._memory = memory

    def begin(self, source: int, shard: int, row: int) -> None:
        """Note that the row at `row` is being read."""
        _FORM.pack_into(self._memory, 0, source, shard, row, True)

    def end(self) -> None:
        """Note that it was read."""
        self._memory[_FORM.size - 1] = 0

    def place(self) -> Place:
        """Return the place."""
        return place_in(self._memory)


READING = Reading()
"""The row that this process reads; it reads one at a time."""


def place_in(memory: Any) -> Place:
    """Return the place that a process keeps in `memory`."""
    return Place(*_FORM.unpack_from(memory))


def describe_place(source: Source, shard: Shard, row: int) -> str:
    """Return where the row at `row` is, for a message, without reading."""
    if isinstance(source, FileSource):
        return source.whereabouts(shard, row)
    try:
        return source.locate(shard, Row(row, 0, None))
    except Exception:  # that of a custom source may look at the content of the row
        return f"part {shard.file + 1} (row {row + 1})"


def persist(read: Callable[[], T], where: Callable[[], str], retries: int) -> T:
    """Return the result of `read`, trying again what fails for a moment.

    Raises DataError when it has failed `retries` times more; other errors at once.
    """
    for attempt in itertools.count(1):
        try:
            return read()
        except Exception as error:
            cause = transient_cause(error)
            if cause is None:
                raise
            reason = f"{type(cause).__name__}: {cause}"
            if attempt > retries:
                raise DataError(f"reading failed {attempt} times at {where()}: {reason}") from error
        pause = FIRST_PAUSE_SECONDS * min(2 ** (attempt - 1), _LONGEST_PAUSE)
        text = "Reading failed at %s: %s; trying again in %g s (%d of %d)"
        logger.warning(text, where(), reason, pause, attempt, retries)
        time.sleep(pause)
    raise AssertionError("endless")


class ShardRows(Iterator[Row]):
    """The rows of a shard, from `cursor` on, read again from where a read failed."""

    def __init__(
        self,
        source: Source,
        shard: Shard,
        cursor: str = "",
        retries: int = 0,
        number: tuple[int, int] = (0, 0),
    ):
        """`number`: those of source and shard, for `READING`."""
        self._source = source
        self._shard = shard
        self._cursor = cursor
        self._retries = retries
        self._number = number
        self._num_given = 0
        """Rows after the cursor."""
        self._in_bytes = isinstance(source, FileSource)
        self._place = 0
        self._rows: Iterator[Row] | None = None

    def __next__(self) -> Row:
        row = persist(self._next, self._where, self._retries)
        # Of bytes or of rows, as the source counts.
        self._place = row.place + (row.size if self._in_bytes else 1)
        self._num_given += 1
        return row

    def cursor(self) -> str:
        """Return the source's cursor after the rows given; empty if it has none."""
        cursor: str = getattr(self._rows, "cursor", str)()
        if cursor:
            self._cursor, self._num_given = cursor, 0
        return cursor

    def _next(self) -> Row:
        READING.begin(*self._number, self._place)
        try:
            rows = self._rows
            if rows is None:
                rows = self._open()
            row = next(rows)
        except StopIteration:
            READING.end()
            raise
        except BaseException:
            self._rows = None  # it has ended
            raise
        READING.end()
        return row

    def _open(self) -> Iterator[Row]:
        source, shard, cursor = self._source, self._shard, self._cursor
        # A custom source may return a list.
        rows = iter(source.rows(shard, cursor) if cursor else source.rows(shard))  # type: ignore[call-arg]
        for _ in itertools.islice(rows, self._num_given):
            pass
        self._rows = rows
        return rows

    def _where(self) -> str:
        return describe_place(self._source, self._shard, self._place)
