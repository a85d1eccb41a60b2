"""Several sources in one lane, by token share.

Within a lane each source is a lane of its own: its shards, its shuffle, its epochs, its packing.
What is mixed are the sequences that these give. In a *round*, in which every lane gives one
sequence, the tokens of the round are dealt to the sources, each time to the one that is furthest
behind its share (`Shares.deal`), and laid out around a circle, one source after another. The lanes
are as many equal arcs of that circle, turned a little further every round, so that every lane gets
of every source (`Shares.parts`). An arc that holds a border of sources is a sequence of two parts.

What is dealt is whole sequences as soon as one of them is less than the promised exactness, a
thousandth of the tokens so far; before that it is single tokens. So the share is exact from the
start, whatever the lengths of documents and sequences, and all but the first sequences are of one
source. A document never lies between pieces of another, and is cut only where its sequence, or its
part of one, ends; it goes on in the lane's next sequence of that source.

Nothing here knows of ranks: how a round is dealt follows from the tokens dealt so far, which every
lane keeps.
"""

from collections.abc import Callable, Mapping, Sequence
from dataclasses import dataclass
from fractions import Fraction
from functools import cached_property
from math import lcm
from typing import Any, NamedTuple

import numpy as np

from torchtitan.data.lanes import Lane, LaneSettings
from torchtitan.data.packing import Position, Sample
from torchtitan.data.sources import Source

EXACTNESS = 1000
"""The share of a source is off by at most one in so many of the tokens, from so many tokens on."""
_GOLDEN = 0x9E3779B97F4A7C15
"""The golden ratio in 64 bits: its multiples fill a circle evenly, however many are taken."""


class Shares:
    """The split of a round's tokens over the sources. Pure arithmetic on integers."""

    def __init__(self, weights: Sequence[float], num_lanes: int, seq_len: int, whole: bool = False):
        """`whole`: sequences cannot consist of parts of several sources."""
        self._whole = whole
        # As they are written: 0.1 is a tenth here, not the nearest binary fraction.
        fractions = [Fraction(str(weight)) for weight in weights]
        scale = lcm(*(fraction.denominator for fraction in fractions))
        self._weights = [int(fraction * scale) for fraction in fractions]
        self._sum = sum(self._weights)
        self._num_lanes = num_lanes
        self._seq_len = seq_len

    def deal(self, taken: Sequence[int]) -> list[int]:
        """Return the tokens of each source in the next round, after `taken` of each so far.

        No source is ever ahead by more than a unit, and so none behind by more than a unit
        for each other source: a token, or, when that many sequences are few enough, a
        sequence.
        """
        before, others = sum(taken), max(1, len(taken) - 1)
        are_few = before >= EXACTNESS * others * self._seq_len
        unit = self._seq_len if are_few or self._whole else 1
        round_size = self._num_lanes * self._seq_len
        # In tokens times the sum of the weights, so that all stay integers.
        whole = unit * self._sum
        behind = [
            weight * (before + round_size) - self._sum * count
            for weight, count in zip(self._weights, taken)
        ]
        # Most at once, leaving enough for the order of the last ones to matter.
        units = [max(0, lack // whole - len(taken)) for lack in behind]
        behind = [lack - whole * given for lack, given in zip(behind, units)]
        for _ in range(round_size // unit - sum(units)):
            source = max(range(len(behind)), key=behind.__getitem__)
            behind[source] -= whole
            units[source] += 1
        return [unit * count for count in units]

    def parts(self, dealt: Sequence[int], round_: int, lane: int) -> list[tuple[int, int]]:
        """Return the parts of a lane's sequence of a round: (source, number of tokens)."""
        turned = ((round_ * _GOLDEN) % 2**64 * self._num_lanes) >> 64
        start = (lane + turned) % self._num_lanes * self._seq_len
        end = start + self._seq_len
        parts, border = [], 0
        for source, count in enumerate(dealt):
            inside = min(end, border + count) - max(start, border)
            if inside > 0:
                parts.append((source, inside))
            border += count
        return parts


class MixedPosition(NamedTuple):
    """The position of a lane of several sources."""

    round: int
    """Sequences that it has given."""
    taken: tuple[int, ...]
    """Tokens that all lanes together have given in as many rounds, of each source."""
    sources: tuple[Position, ...]
    """Start of the next sequence, or part of one, of each source."""

    @property
    def bad_rows(self) -> int:
        """Rows left out before this place."""
        return sum(position.bad_rows for position in self.sources)

    @property
    def counts(self) -> tuple[int, ...]:
        """The counts of conversations, in the order of COUNTS."""
        return tuple(map(sum, zip(*(position.counts for position in self.sources))))

    def state(self) -> dict[str, Any]:
        """Return the position as JSON values."""
        sources = [position.state() for position in self.sources]
        return {"round": self.round, "taken": list(self.taken), "sources": sources}

    def without_cursor(self) -> "MixedPosition":
        """Return the same places without cursors: they are found by reading rows again."""
        return self._replace(sources=tuple(place.without_cursor() for place in self.sources))


AnyPosition = Position | MixedPosition


@dataclass(frozen=True)
class Mixture:
    """The part that all lanes of a run share: one source, or several with their shares."""

    sources: tuple[LaneSettings, ...]
    names: tuple[str, ...]
    weights: tuple[float, ...]

    @property
    def is_whole(self) -> bool:
        """Return whether conversations are among the data, which are not cut."""
        return any(settings.chat is not None for settings in self.sources)

    @property
    def pad_to_multiple(self) -> int | None:
        """The multiple to which batches are padded; None if they are all of `seq_len`."""
        return next(filter(None, (settings.pad_to_multiple for settings in self.sources)), None)

    def describe(self) -> str:
        """Describe in one line how rows become documents."""
        said = (
            settings.tokenizer.describe() if settings.chat is None else settings.chat.describe()
            for settings in self.sources
        )
        return "; ".join(dict.fromkeys(said))

    @cached_property
    def shares(self) -> Shares:
        """The split of a round over the sources."""
        first = self.sources[0]
        return Shares(self.weights, first.num_lanes, first.seq_len, self.is_whole)

    def start(self) -> AnyPosition:
        """Return the position at which a lane starts."""
        count = len(self.sources)
        return MixedPosition(0, (0,) * count, (Position(),) * count) if count > 1 else Position()

    def position(self, state: Mapping[str, Any]) -> AnyPosition:
        """Return the position of a stored state. Raises TypeError or KeyError for other data."""
        if len(self.sources) == 1:
            return Position(**state)
        sources = tuple(Position(**inner) for inner in state["sources"])
        taken = tuple(int(count) for count in state["taken"])
        if not len(self.sources) == len(sources) == len(taken):
            raise TypeError(f"it is of {len(sources)} sources, and there are {len(self.sources)}")
        return MixedPosition(int(state["round"]), taken, sources)

    def lane(self, index: int, position: AnyPosition) -> "Lane | MixedLane":
        """Return lane `index` from `position` on."""
        if isinstance(position, Position):
            return Lane(self.sources[0], index, position)
        return MixedLane(self, index, position)

    def description(self, describe: Callable[[Source], Any]) -> Any:
        """Return what identifies the data (JSON), with what `describe` says of each source."""
        if len(self.sources) == 1:
            return self.sources[0].description(describe)
        return [
            {"weight": weight, "data": settings.description(describe)}
            for weight, settings in zip(self.weights, self.sources)
        ]

    def source_tokens(self, position: AnyPosition) -> dict[str, int]:
        """Return the tokens of each source so far, over all lanes; empty for one source."""
        if isinstance(position, Position):
            return {}
        return dict(zip(self.names, position.taken))


class MixedLane:
    """The stream of lane `index` of a mixture, from `position` on. It never ends."""

    def __init__(self, mixture: Mixture, index: int, position: MixedPosition):
        self.position = position
        """The start of the next sequence."""
        self._shares = mixture.shares
        self._index = index
        self._lanes = [
            Lane(settings, index, inner)
            for settings, inner in zip(mixture.sources, position.sources)
        ]

    def close(self) -> None:
        """Close open files."""
        for lane in self._lanes:
            lane.close()

    def next_sample(self) -> Sample:
        """Return the next sequence, of one or several parts. Raises DataError."""
        position = self.position
        dealt = self._shares.deal(position.taken)
        parts = []
        for source, count in self._shares.parts(dealt, position.round, self._index):
            part = self._lanes[source].next_sample(count)
            assert part is not None, "sources of a mixture do not end"
            spans = tuple(span._replace(source=source) for span in part.spans)
            parts.append(part._replace(spans=spans))
        self.position = MixedPosition(
            round=position.round + 1,
            taken=tuple(before + now for before, now in zip(position.taken, dealt)),
            sources=tuple(lane.position for lane in self._lanes),
        )
        if len(parts) == 1:
            return parts[0]
        return Sample(
            tokens=np.concatenate([part.tokens for part in parts]),
            lengths=tuple(length for part in parts for length in part.lengths),
            parts=tuple(len(part.tokens) for part in parts),
            spans=tuple(span for part in parts for span in part.spans),
        )
