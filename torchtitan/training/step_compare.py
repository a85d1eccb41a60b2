"""Comparison of two recorded steps: the first tensor that differs, where, and on which ranks."""

import itertools
import math
from collections.abc import Callable, Collection, Mapping, Sequence
from dataclasses import dataclass, field

import numpy as np

from torchtitan.distributed.parallel_dims import AXES
from torchtitan.training.recorded_tensors import PHASES_OF_ACTIVATIONS, Name, Piece, RecordedTensors
from torchtitan.training.tensor_recorder import PHASES

EXACT = 1e-9
"""The bound in float64: rounding stays below 1e-11, and mistakes are above 1e-4."""
_TIMES_NOISE = 8.0
_LEAST_SCALE = 1e-3
"""A share of the largest value of the phase so far; smaller ones may be nothing but rounding."""


@dataclass(frozen=True)
class Difference:
    """A tensor that differs by more than rounding explains."""

    phase: str
    name: str
    relative: float
    """The largest difference, in units of the largest value."""
    index: dict[str, int]
    """The element that differs most, by dimension."""
    values: tuple[float, float]
    """The values of that element."""
    axes: tuple[str, ...]
    """The axes of the mesh on which ranks are right or wrong, or copies unlike."""
    ranks: tuple[int, ...]
    """The ranks that differ from the other side."""
    where: str
    """Those ranks in words."""
    copies_differ: bool
    """Ranks that should hold the same values do not."""
    ratio: float | None = None
    """The second value over the first, if it is the same for all of several elements."""


@dataclass
class Comparison:
    """All that was compared, in the order of a step."""

    differences: list[Difference] = field(default_factory=list)
    counts: dict[str, int] = field(default_factory=lambda: dict.fromkeys(PHASES, 0))
    """Tensors of each phase that agree, before the first that differs."""
    largest: float = 0.0
    """The largest relative difference of the tensors before the first that differs."""
    bound: float = EXACT
    """The relative difference that rounding explains, at the first that differs or the last."""
    skipped: list[str] = field(default_factory=list)
    """Names that only one side has, or that have other shapes."""


def compare_steps(
    one: RecordedTensors,
    other: RecordedTensors,
    exact: RecordedTensors | None = None,
    bound: float | None = None,
    most: int = 8,
    on_phase: Callable[[str], None] = lambda phase: None,
) -> Comparison:
    """Compare two sides, up to `most` differences.

    `bound`: the relative difference that rounding explains, by default that of float64. `exact`:
    the first side in float64; its differences to the first side are the rounding that the formats
    of that one explain. `on_phase` is called with the phases.
    """
    fixed = EXACT if bound is None else bound
    result = Comparison(bound=fixed)
    phase, largest_value, noise = "", 0.0, 0.0
    for name in one.names():
        if name[0] != phase:
            phase, largest_value, noise = name[0], 0.0, 0.0
            on_phase(phase)
        sides = [side for side in (one, other, exact) if side is not None]
        wholes = _assemble(name, sides) if all(name in side.entries for side in sides) else None
        if wholes is None:
            result.skipped.append(f"{name[0]}: {name[1]}")
            continue
        first = wholes[0].values
        largest_value = max(largest_value, _largest(first))
        scale = max(_largest(first), _LEAST_SCALE * largest_value)
        bound = fixed
        if exact is not None:
            noise = max(noise, _relative(_gap(first, wholes[2].values), scale))
            bound = max(fixed, _TIMES_NOISE * noise)
        found = _difference(name, wholes[0], wholes[1], scale, bound, (one, other))
        if found is None and not result.differences:
            apart = _relative(_gap(first, wholes[1].values), scale)
            result.largest = max(result.largest, apart)
            result.counts[phase] += 1
        if not result.differences:
            result.bound = bound
        if found is not None:
            result.differences.append(found)
            if len(result.differences) == most:
                break
    result.skipped += [f"{p}: {n}" for p, n in other.names() if (p, n) not in one.entries]
    return result


@dataclass
class _Whole:
    """A tensor put together from the ranks of one side."""

    values: np.ndarray
    pieces: list[Piece]
    num_tokens: int

    def unlike_copies(self, tolerance: float) -> list[tuple[int, int]]:
        """Return pairs of ranks that hold the same elements with other values."""
        return [
            (first.ranks[0], piece.ranks[0])
            for first, *others in _by_indices(self.pieces)
            for piece in others
            if _gap(first.values, piece.values).max(initial=0) > tolerance
        ]

    def wrong_ranks(self, right: np.ndarray, tolerance: float) -> set[int]:
        """Return the ranks that hold other values than `right`."""
        wrong: set[int] = set()
        for piece in self.pieces:
            expected = right[np.ix_(*piece.indices)] if piece.indices else right
            if _gap(expected, piece.values).max(initial=0) > tolerance:
                wrong.update(piece.ranks)
        return wrong


def _assemble(name: Name, sides: Sequence[RecordedTensors]) -> list[_Whole] | None:
    """Put a tensor together on each side; None if the sides' shapes cannot be the same."""
    num_features = num_tokens = 0
    if sides[0].is_activation(name):
        common = set.intersection(*(side.feature_sizes(name) for side in sides))
        if not common:
            return None
        num_features = max(common)  # parts that are alike compare as well
        num_tokens = max(side.num_tokens(name) for side in sides)
    held = [list(side.pieces(name, num_features, num_tokens)) for side in sides]
    if name[0] == "backward":
        held = [_summed(pieces) for pieces in held]
    dimensions = {len(piece.indices) for pieces in held for piece in pieces}
    if len(dimensions) != 1:
        return None
    shape = [
        1 + max(int(p.indices[d].max(initial=-1)) for pieces in held for p in pieces)
        for d in range(dimensions.pop())
    ]
    wholes = []
    for pieces in held:
        values = np.full(shape, np.nan)
        for piece in pieces:
            if piece.indices:
                values[np.ix_(*piece.indices)] = piece.values
            else:
                values[()] = piece.values
        wholes.append(_Whole(values, pieces, num_tokens))
    return wholes


def _by_indices(pieces: Sequence[Piece]) -> list[list[Piece]]:
    """Return the pieces with the same elements together."""
    groups: dict[tuple[bytes, ...], list[Piece]] = {}
    for piece in pieces:
        groups.setdefault(tuple(i.tobytes() for i in piece.indices), []).append(piece)
    return list(groups.values())


def _summed(pieces: Sequence[Piece]) -> list[Piece]:
    """Add the gradients that tensor-parallel ranks have of an input that they share.

    Each has the term of its own rows or heads. What they have of separate tokens is whole.
    """
    return [
        Piece(
            tuple(rank for piece in group for rank in piece.ranks),
            group[0].indices,
            np.sum([piece.values for piece in group], axis=0),
        )
        for group in _by_indices(pieces)
    ]


def _difference(
    name: Name,
    one: _Whole,
    other: _Whole,
    scale: float,
    bound: float,
    sides: Sequence[RecordedTensors],
) -> Difference | None:
    """Describe how two sides differ; None if that is within the bound, and all copies are alike."""
    gap, tolerance = _gap(one.values, other.values), bound * scale
    unlike = [whole.unlike_copies(tolerance) for whole in (one, other)]
    if gap.max(initial=0) <= tolerance and not any(unlike):
        return None
    # Of the side with more ranks: those of one rank are all right, or all wrong.
    which = int(len(sides[1].places) >= len(sides[0].places))
    side, whole, right = sides[which], (one, other)[which], (one, other)[1 - which]
    wrong = whole.wrong_ranks(right.values, tolerance)
    pairs = unlike[which] or unlike[1 - which]
    holders = {rank: side.places[rank] for piece in whole.pieces for rank in piece.ranks}
    if pairs:
        places = sides[which if unlike[which] else 1 - which].places
        axes = tuple(a for a in AXES if any(places[x][a] != places[y][a] for x, y in pairs))
    else:
        axes = _axes_of(wrong, holders) or _other_degrees(*sides)
    place = np.unravel_index(int(gap.argmax()), gap.shape) if gap.shape else ()
    ratio = _ratio(one.values, other.values, scale, bound)
    return Difference(
        *name,
        relative=_relative(gap, scale),
        index=_index(name, [int(i) for i in place], one.num_tokens),
        values=(float(one.values[place]), float(other.values[place])),
        axes=axes,
        ranks=tuple(sorted(wrong)),
        where=_where(axes, bool(pairs), wrong, side.places, holders),
        copies_differ=bool(pairs),
        ratio=ratio,
    )


def _axes_of(wrong: set[int], places: Mapping[int, Mapping[str, int]]) -> tuple[str, ...]:
    """Return the fewest axes that say which ranks are wrong; none if all of them are."""
    for size in range(len(AXES) + 1):
        for axes in itertools.combinations(AXES, size):
            seen: dict[tuple[int, ...], set[bool]] = {}
            for rank, place in places.items():
                seen.setdefault(tuple(place[axis] for axis in axes), set()).add(rank in wrong)
            if all(len(states) == 1 for states in seen.values()):
                return axes
    raise AssertionError("all axes together tell each rank")


def _other_degrees(one: RecordedTensors, other: RecordedTensors) -> tuple[str, ...]:
    """Return the axis on which the meshes differ, if it is only one."""
    axes = tuple(axis for axis in AXES if one.degrees[axis] != other.degrees[axis])
    return axes if len(axes) == 1 else ()


def _where(
    axes: tuple[str, ...],
    copies_differ: bool,
    wrong: set[int],
    places: Mapping[int, Mapping[str, int]],
    holders: Collection[int],
) -> str:
    """Describe which ranks differ, those of the side that has more."""
    if len(places) == 1:
        return ""
    if copies_differ:
        return f"ranks along {' and '.join(axes)} should hold the same values, and do not"
    if wrong == set(holders):
        each = "on every rank" if len(wrong) > 1 else "on the rank that holds it"
        return f"{each}; the meshes differ in {axes[0]}" if axes else each
    right = {tuple(places[rank][axis] for axis in axes) for rank in wrong}
    ranks = ", ".join(" ".join(f"{a} {n}" for a, n in zip(axes, p)) for p in sorted(right))
    return f"only on ranks with {ranks}"


def _index(name: Name, place: list[int], num_tokens: int) -> dict[str, int]:
    if len(place) == 2 and name[0] in PHASES_OF_ACTIVATIONS:
        sequence, token = divmod(place[0], num_tokens)
        return {"sequence": sequence, "token": token, "feature": place[1]}
    names = ("row", "column") if len(place) == 2 else [f"dimension {n}" for n in range(9)]
    return dict(zip(names, place))


def _gap(one: np.ndarray, other: np.ndarray) -> np.ndarray:
    """Return absolute differences; infinite where only one is a number."""
    with np.errstate(invalid="ignore"):
        gap = np.abs(one - other)
    alike = (one == other) | (np.isnan(one) & np.isnan(other))
    return np.where(alike, 0.0, np.where(np.isnan(gap), np.inf, gap))


def _largest(values: np.ndarray) -> float:
    finite = np.abs(values[np.isfinite(values)])
    return float(finite.max(initial=0.0))


def _relative(gap: np.ndarray, scale: float) -> float:
    largest = float(gap.max(initial=0.0))
    return largest / scale if scale else (math.inf if largest else 0.0)


def _ratio(one: np.ndarray, other: np.ndarray, scale: float, bound: float) -> float | None:
    """Return the factor between two tensors, if that is all that differs."""
    large = np.abs(one) > 1e-3 * scale
    if large.sum() < 2 or not np.isfinite(other).all() or not other[large].any():
        return None
    ratio = float(np.median(other[large] / one[large]))
    return ratio if _gap(one * ratio, other).max() <= 10 * bound * scale * abs(ratio) else None
