"""The comparison that the table rests on sees whatever may be wrong on whichever rank."""

import math

import numpy as np
import pytest

from tests.distributed.tiny import Part, Result, compare

WEIGHT = np.arange(1.0, 13.0).reshape(4, 3)


def rows(*indices: int) -> Part:
    """What a rank holds of `WEIGHT`."""
    return Part((np.array(indices, dtype=np.int64), np.arange(3)), WEIGHT[list(indices)].copy())


def result(weight: Part) -> Result:
    moment = Part(weight.indices, weight.values.copy())
    return Result([4.0, 2.0], [0.5, 0.25], 1.0, {"weight": weight}, {"exp_avg of weight": moment})


def ranks() -> list[Result]:
    """One row is held twice; the last rank holds nothing."""
    return [result(rows(0, 2)), result(rows(1, 2, 3)), result(rows())]


def test_equal_is_equal() -> None:
    difference = compare(ranks(), result(rows(0, 1, 2, 3)))
    assert difference.worst == 0


@pytest.mark.parametrize("value", [3.0, math.nan])
@pytest.mark.parametrize("rank", [0, 1])
@pytest.mark.parametrize("kind", ["losses", "norms", "evaluated", "parameters", "moments"])
def test_one_number_on_one_rank(kind: str, rank: int, value: float) -> None:
    results = ranks()
    if kind == "evaluated":
        results[rank].evaluated = value
    elif kind in ("losses", "norms"):
        getattr(results[rank], kind)[1] = value
    else:
        [part] = getattr(results[rank], kind).values()
        part.values[1, 0] = value  # of the row that both hold
    difference = compare(results, result(rows(0, 1, 2, 3)))
    assert not difference.worst < 0.1
    assert not difference.between_ranks < 0.1
    if rank == 0:
        assert not getattr(difference, kind) < 0.1


def test_what_one_rank_alone_holds() -> None:
    results = ranks()
    results[1].parameters["weight"].values[0, 0] += 0.012
    difference = compare(results, result(rows(0, 1, 2, 3)))
    assert difference.parameters == pytest.approx(0.012 / 12)
    assert difference.moments == difference.between_ranks == 0


def test_rows_and_tensors_that_are_missing_or_too_many() -> None:
    whole = result(rows(0, 1, 2, 3))
    with pytest.raises(AssertionError, match="no rank holds all of weight"):
        compare([result(rows(0, 2)), result(rows(2, 3))], whole)
    for change in (dict.clear, lambda tensors: tensors.update(bias=rows(0))):
        results = ranks()
        for changed in results:
            change(changed.moments)
        with pytest.raises(AssertionError):
            compare(results, whole)
