"""What follows from a config and a number of processes."""

import pytest

from torchtitan.config.load import load_config
from torchtitan.config.run_context import RunContext, default_lanes


def context(world_size: int, **keys: object) -> RunContext:
    arguments = [f"--{name.replace('__', '.')}={value}" for name, value in keys.items()]
    return RunContext(load_config(arguments).config, world_size, "cpu")


def test_shard_degree_takes_the_rest():
    resolved = context(8, parallelism__data_parallel_replicate_degree=2)
    assert (resolved.shard_degree, resolved.dp_degree) == (4, 8)
    fixed = context(
        8,
        parallelism__data_parallel_replicate_degree=4,
        parallelism__data_parallel_shard_degree=2,
    )
    assert (fixed.shard_degree, fixed.dp_degree) == (2, 8)
    too_few_ranks = context(1, parallelism__data_parallel_replicate_degree=4)
    assert too_few_ranks.shard_degree == 1


def test_dimensions_that_cut_the_model_are_no_data_ranks():
    mesh = {"parallelism__tensor_parallel_degree": 2, "parallelism__context_parallel_degree": 2}
    assert context(16, **mesh).dp_degree == 4


def test_batch_and_accumulation():
    assert context(4, training__local_batch_size=3).global_batch_size == 12
    given = context(4, training__local_batch_size=3, training__global_batch_size=24)
    assert (given.global_batch_size, given.accumulation_steps) == (24, 2)


@pytest.mark.parametrize(
    ("batch", "lanes"), [(1, 1), (8, 8), (64, 64), (96, 48), (67, 1), (128, 64), (130, 26)]
)
def test_default_lanes_are_the_largest_divisor_up_to_64(batch: int, lanes: int):
    assert default_lanes(batch) == lanes


def test_lanes_do_not_depend_on_the_mesh():
    assert [context(n, training__global_batch_size=96).num_lanes for n in (1, 2, 4)] == [48] * 3
    assert context(2, training__global_batch_size=96, data__lanes=6).num_lanes == 6
