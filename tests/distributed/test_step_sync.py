"""How ranks talk and agree."""

import dataclasses
import time
from typing import Any

import pytest
import torch

from tests.pool import GlooPool, RankFailure
from torchtitan.config import DataError, NonFiniteError
from torchtitan.distributed.context import DistributedContext, set_timeout
from torchtitan.distributed.parallel_dims import ParallelDims
from torchtitan.distributed.step_sync import StepInfo, start_step_sync
from torchtitan.models.batch import IGNORE_INDEX, Batch
from torchtitan.training.nonfinite_guard import NonFiniteGuard
from torchtitan.training.nonfinite_origin import StepBatch

QUIET: dict[str, Any] = {
    "num_targets": 10,
    "num_tokens": 16,
    "ended": False,
    "stop": False,
    "failed": False,
    "is_data_leader": True,
}


def _exchange(world: DistributedContext, by_rank: dict[int, dict[str, Any]]) -> dict[str, Any]:
    pending = start_step_sync(world, **{**QUIET, **by_rank.get(world.rank, {})})
    return dataclasses.asdict(pending.wait())


@pytest.mark.parametrize(
    ("by_rank", "expected"),
    [
        ({}, StepInfo(30, 48, False, False, 0)),
        ({1: {"num_targets": 3}}, StepInfo(23, 48, False, False, 0)),
        ({1: {"is_data_leader": False}}, StepInfo(20, 32, False, False, 0)),
        ({2: {"stop": True}}, StepInfo(30, 48, False, True, 0)),
        ({0: {"ended": True}, 1: {"ended": True}}, StepInfo(30, 48, False, False, 0)),
        ({r: {"ended": True} for r in range(3)}, StepInfo(30, 48, True, False, 0)),
        ({2: {"failed": True}}, StepInfo(30, 48, False, False, 1)),
        ({1: {"failed": True}, 2: {"failed": True}}, StepInfo(30, 48, False, False, 2)),
        ({1: {"save_failed": True}}, StepInfo(30, 48, False, False, 0, True)),
        (
            {r: {"bad_rows": r + 1, "is_data_leader": r != 1} for r in range(3)},
            StepInfo(20, 32, False, False, 0, bad_rows=4),
        ),
    ],
)
def test_all_ranks_learn_the_same(
    by_rank: dict[int, dict[str, Any]], expected: StepInfo, gloo_pool: GlooPool
) -> None:
    results = gloo_pool.run(3, _exchange, by_rank)
    assert results == [dataclasses.asdict(expected)] * 3


def _gather_distinct(world: DistributedContext) -> list[Any]:
    stage = world.rank % 2  # of ranks 0 to 2 the last one has what the first one has
    return world.gather_distinct_json({"b": [stage, "ä" * stage], "a": None})


def test_what_ranks_have_alike_is_gathered_once(gloo_pool: GlooPool) -> None:
    first, second = {"b": [0, ""], "a": None}, {"b": [1, "ä"], "a": None}
    assert gloo_pool.run(3, _gather_distinct) == [[first, second]] * 3
    assert gloo_pool.run(1, _gather_distinct) == [[first]]


def _talk(world: DistributedContext) -> tuple[list[Any], Any]:
    mine = {"rank": world.rank, "text": "ä" * world.rank}
    gathered = world.gather_json(mine)
    world.barrier()
    return gathered, world.broadcast_json({"from": world.rank, "none": None})


@pytest.mark.parametrize("world_size", [1, 3])
def test_json_goes_around(world_size: int, gloo_pool: GlooPool) -> None:
    gathered = [{"rank": rank, "text": "ä" * rank} for rank in range(world_size)]
    expected = (gathered, {"from": 0, "none": None})
    assert gloo_pool.run(world_size, _talk) == [expected] * world_size


class _Data:
    """A loader of the given steps, which then can not read."""

    def __init__(self, steps: list[Any]):
        self.steps = steps

    def next_step(self, patience: float) -> Any:
        if not self.steps:
            raise DataError("rows.jsonl, line 3: not JSON")
        return self.steps.pop(0)


def _step(num_targets: int, bad_rows: int = 0) -> Any:
    from torchtitan.data.loader import StepData

    labels = torch.full((1, 4), IGNORE_INDEX)
    labels[0, :num_targets] = 1
    return StepData([Batch(tokens=torch.ones(1, 4), labels=labels)], {}, False, bad_rows)


def _targets_of_steps(world: DistributedContext) -> list[int]:
    from torchtitan.loss.cross_entropy import CrossEntropyLoss
    from torchtitan.training.prefetch import Prefetch
    from torchtitan.utils.processes import StopRequest

    own = [(1, 0, 0, 2), (1, 0, 0, 0)][world.rank]
    data = _Data([_step(num_targets) for num_targets in own])
    ahead = Prefetch(data, CrossEntropyLoss(), world, StopRequest(), True)  # type: ignore[arg-type]
    counts = []
    for _ in range(2):
        ahead.start()
        counts.append(ahead.wait()[1].num_targets)
    return counts


def test_steps_without_any_target_are_left_out(gloo_pool: GlooPool) -> None:
    assert gloo_pool.run(2, _targets_of_steps) == [[2, 2], [2, 2]]


def _only_empty_steps(world: DistributedContext) -> str:
    from torchtitan.loss.cross_entropy import CrossEntropyLoss
    from torchtitan.training.prefetch import Prefetch
    from torchtitan.utils.processes import StopRequest

    data = _Data([_step(num_targets=0)] * 1001)
    ahead = Prefetch(data, CrossEntropyLoss(), world, StopRequest(), True)  # type: ignore[arg-type]
    ahead.start()
    with pytest.raises(DataError) as caught:
        ahead.wait()
    return str(caught.value)


def test_row_65_data_without_any_target_end_the_run(gloo_pool: GlooPool) -> None:
    (text,) = gloo_pool.run(1, _only_empty_steps)
    assert "1000 steps in a row have no targets" in text


def _fetch_where_rank_1_fails(world: DistributedContext) -> str:
    from torchtitan.loss.cross_entropy import CrossEntropyLoss
    from torchtitan.training.prefetch import Prefetch
    from torchtitan.utils.processes import StopRequest

    steps = [] if world.rank == 1 else [_step(num_targets=1)]
    ahead = Prefetch(_Data(steps), CrossEntropyLoss(), world, StopRequest(), True)  # type: ignore[arg-type]
    ahead.start()
    try:
        ahead.wait()
    except DataError as error:
        return str(error)
    return "no error"


@pytest.mark.fault("F38")
def test_failure_to_read_reaches_all(gloo_pool: GlooPool) -> None:
    first, second, third = gloo_pool.run(3, _fetch_where_rank_1_fails)
    assert second == "rows.jsonl, line 3: not JSON"
    assert first == third
    assert first == f"rank 1: {second}"


def _leave_out_rows(world: DistributedContext, max_bad_rows: int) -> str:
    from torchtitan.loss.cross_entropy import CrossEntropyLoss
    from torchtitan.training.prefetch import Prefetch
    from torchtitan.utils.processes import StopRequest

    data = _Data([_step(num_targets=1, bad_rows=2)])
    ahead = Prefetch(
        data,  # type: ignore[arg-type]
        CrossEntropyLoss(),
        world,
        StopRequest(),
        True,
        max_bad_rows=max_bad_rows,
    )
    ahead.start()
    try:
        return str(ahead.wait()[1].bad_rows)
    except DataError as error:
        return str(error)


@pytest.mark.fault("F40")
def test_row_57_rows_left_out_count_on_all_ranks_together(gloo_pool: GlooPool) -> None:
    """So a run stops where it would on any other mesh."""
    assert gloo_pool.run(2, _leave_out_rows, 4) == ["4", "4"]
    first, second = gloo_pool.run(2, _leave_out_rows, 3)
    assert first == second and "left out 4 rows" in first and "max_bad_rows = 3" in first


def _wait_for_nobody(world: DistributedContext) -> float:
    set_timeout(world, 2)
    started = time.monotonic()
    if world.rank == 0:
        with pytest.raises(RuntimeError):
            torch.distributed.all_reduce(torch.zeros(1))
    else:
        time.sleep(4)
    return time.monotonic() - started


def test_timeout_can_be_changed(gloo_pool: GlooPool) -> None:
    assert gloo_pool.run(2, _wait_for_nobody, timeout=60)[0] < 30


def _raise_on_rank_1(world: DistributedContext) -> None:
    if world.rank == 1:
        raise ValueError("of rank 1")


def test_pool_tells_what_failed_and_recovers() -> None:
    pool = GlooPool()
    try:
        with pytest.raises(RankFailure, match="of rank 1"):
            pool.run(2, _raise_on_rank_1)
        assert len(pool.run(2, _talk)) == 2
    finally:
        pool.close()


def batch_of(step: int) -> StepBatch:
    return StepBatch(step, (), 1)


GOOD, BAD = torch.tensor(1.0), torch.tensor(float("inf"))


@pytest.mark.parametrize("lag", [0, 1])
def test_steps_that_are_not_finite_are_told_late_or_at_once(lag: int) -> None:
    steps = NonFiniteGuard(lag)
    assert steps.record(batch_of(1), GOOD, GOOD)
    if lag:
        assert not steps.record(batch_of(2), GOOD, BAD)
        with pytest.raises(NonFiniteError, match="step 2"):
            steps.record(batch_of(3), GOOD, GOOD)
    else:
        with pytest.raises(NonFiniteError, match="step 2"):
            steps.record(batch_of(2), BAD, GOOD)


def test_settling_waits_for_all_steps() -> None:
    steps = NonFiniteGuard(lag=1)
    steps.record(batch_of(1), BAD, GOOD)
    with pytest.raises(NonFiniteError, match="step 1"):
        steps.flush()


def test_places_on_a_mesh_of_all_axes() -> None:
    dims = ParallelDims(pp=2, dp_replicate=2, dp_shard=2, cp=2, tp=2)
    assert dims.world_size == 32
    assert dims.ranks_per_stage == 16
    assert [dims.dp_rank(rank) for rank in (0, 3, 4, 12, 15, 16, 31)] == [0, 0, 1, 3, 3, 0, 3]
    assert [rank for rank in range(32) if dims.is_data_leader(rank)] == [0, 4, 8, 12]
