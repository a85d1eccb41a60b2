"""The table would notice: each of these mistakes, put back, is far above its tolerance."""

import pytest

from tests.distributed import tiny
from tests.parity.historical_bugs import BUGS, train_wrongly
from tests.parity.table import TABLE, TOLERANCE, reference_of
from tests.pool import GlooPool

MARGIN = 1e8
"""Times the tolerance: no mistake hides near rounding."""


@pytest.mark.parametrize("name", BUGS)
def test_mistake_is_noticed(name: str, gloo_pool: GlooPool, one_process) -> None:
    case = BUGS[name].case
    assert case in TABLE
    ranks = gloo_pool.run(case.world_size, train_wrongly, name)
    assert any(calls for _, calls in ranks), "the mistake was not made"
    results = [result for result, _ in ranks]
    difference = tiny.compare(results, one_process(reference_of(case)))
    assert difference.worst > MARGIN * TOLERANCE, difference


def test_a_mistake_is_undone(gloo_pool: GlooPool, one_process) -> None:
    """Else one would be found for another's sake."""
    name, bug = next(iter(BUGS.items()))
    gloo_pool.run(bug.case.world_size, train_wrongly, name)
    results = gloo_pool.run(bug.case.world_size, tiny.train, bug.case)
    assert tiny.compare(results, one_process(reference_of(bug.case))).worst < TOLERANCE


def test_there_are_many() -> None:
    assert len(BUGS) >= 12
