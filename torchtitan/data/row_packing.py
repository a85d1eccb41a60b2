"""Whole conversations become sequences: several a row, or one.

A *window* is a short run of the lane's rows of data. Its units (conversations, or pairs) are put
into sequences by best fit, longest first; or, without packing, each is a sequence, and those of
like length come at the same time in all lanes, so that batches hold little padding. A window is a
function of the place at which it begins, so the lane's state is that place and how many of the
window's sequences were taken, and a resume reads one window again.
"""

from collections.abc import Iterator
from dataclasses import dataclass
from typing import NamedTuple

import numpy as np

from torchtitan.data.chat_encoder import Unit
from torchtitan.data.packing import Position, Sample
from torchtitan.data.shuffle import combine, permutation

_MOST_ROWS = 16
"""Sequences of a window: more fill better, and take longer to read again."""
_FILLED = 0.98
"""A window ends early where its units fill so much of their sequences."""
_UNPACKED_UNITS, _LIKE_UNITS = 64, 8
"""Units of a window without packing, and how many of like length follow each other."""


class Units(NamedTuple):
    """The samples of one row of the data."""

    position: Position
    units: tuple[Unit, ...]


@dataclass(frozen=True)
class RowRule:
    """The way in which units become sequences."""

    seq_len: int
    packing: bool
    seed: int


class RowPacker:
    """Sequences of whole units, from a window at a time."""

    def __init__(self, rows: Iterator[Units], rule: RowRule, taken: int):
        """`taken`: sequences of the first window that were given before."""
        self._rows = rows
        self._rule = rule
        self._skip = taken
        self._next: Units | None = None
        self._start: Position | None = None
        self._window: list[list[Unit]] = []
        self._num_given = 0

    def next_sample(self, length: int | None = None) -> tuple[Sample, Position] | None:
        """Return a sequence and the position of the next one; None when the data have ended.

        `length` is that of every sequence.
        """
        while self._num_given == len(self._window):
            if not self._read_window():
                return None
        units = self._window[self._num_given]
        self._num_given += 1
        if self._num_given == len(self._window) and self._next is not None:
            after = self._next.position
        else:
            assert self._start is not None
            after = self._start._replace(taken=self._num_given)
        return sequence_of(units), after

    def _read_window(self) -> bool:
        """Fill the next window; return False at the end of the data."""
        first = self._next or next(self._rows, None)
        if first is None:
            return False
        self._start, self._next = first.position, None
        units = list(first.units)
        while (rows := self._arrange(units)) is None:
            self._next = next(self._rows, None)
            if self._next is None:
                rows = self._packed(units) if self._rule.packing else self._in_turn(units)
                break
            units += self._next.units
        else:
            self._next = next(self._rows, None)
        self._window = rows
        self._num_given, self._skip = min(self._skip, len(rows)), 0
        return True

    def _arrange(self, units: list[Unit]) -> list[list[Unit]] | None:
        """Return the sequences of a window that is complete, None for one that is not."""
        if not self._rule.packing:
            return self._in_turn(units) if len(units) >= _UNPACKED_UNITS else None
        total, seq_len = sum(unit.size for unit in units), self._rule.seq_len
        least = -(-total // seq_len)
        if least < _MOST_ROWS and total < _FILLED * least * seq_len:
            return None
        rows = self._packed(units)
        is_filled = total >= _FILLED * len(rows) * seq_len
        return rows if is_filled or len(rows) >= _MOST_ROWS else None

    def _packed(self, units: list[Unit]) -> list[list[Unit]]:
        """Return the units in rows: each, longest first, into the fullest row that has room."""
        rows: list[list[Unit]] = []
        room: list[int] = []
        for unit in sorted(units, key=lambda unit: -unit.size):
            fits = [number for number, left in enumerate(room) if left >= unit.size]
            if fits:
                best = min(fits, key=room.__getitem__)
            else:
                best = len(rows)
                rows.append([])
                room.append(self._rule.seq_len)
            rows[best].append(unit)
            room[best] -= unit.size
        order = permutation(len(rows), combine(self._rule.seed, len(rows)))
        return [rows[number] for number in order]

    def _in_turn(self, units: list[Unit]) -> list[list[Unit]]:
        """Return each unit as a row; all lanes give those of a like length at the same time."""
        by_length = sorted(units, key=lambda unit: unit.size)
        groups = [by_length[k : k + _LIKE_UNITS] for k in range(0, len(units), _LIKE_UNITS)]
        order = permutation(len(groups), combine(self._rule.seed, len(groups)))
        return [[unit] for number in order for unit in groups[number]]


def sequence_of(units: list[Unit]) -> Sample:
    """Return the units as one sequence, each document a part of its own."""
    lengths = tuple(length for unit in units for length in unit.lengths)
    return Sample(
        tokens=np.concatenate([unit.tokens for unit in units]),
        lengths=lengths,
        parts=lengths,
        trained=np.concatenate([unit.trained for unit in units]),
        spans=tuple(unit.span for unit in units if unit.span is not None),
    )
