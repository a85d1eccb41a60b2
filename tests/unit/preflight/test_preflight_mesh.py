"""The mesh and the batch against the number of processes."""

import pytest

from torchtitan.config.load import load_config
from torchtitan.config.run_context import RunContext
from torchtitan.preflight import ARITHMETIC, errors_of, preflight
from torchtitan.preflight.mesh import check_static


def problems(world_size: int, *arguments: str) -> list[str]:
    return [
        str(p) for p in check_static(RunContext(load_config(arguments).config, world_size, "cpu"))
    ]


REPLICATE = "--parallelism.data_parallel_replicate_degree"
SHARD = "--parallelism.data_parallel_shard_degree"


@pytest.mark.parametrize(
    ("world_size", "arguments"),
    [
        (1, []),
        (512, []),
        (8, [REPLICATE, "2"]),
        (8, [REPLICATE, "2", SHARD, "4"]),
        (2, ["--training.global_batch_size", "48"]),
    ],
)
def test_good_meshes(world_size: int, arguments: list[str]):
    assert problems(world_size, *arguments) == []


def test_product_is_said_and_mended():
    (problem,) = problems(8, REPLICATE, "2", SHARD, "3")
    assert "data_parallel_replicate_degree 2 x data_parallel_shard_degree 3 = 6" in problem
    assert "WORLD_SIZE = 8" in problem
    assert "data_parallel_shard_degree to -1" in problem


def test_rest_that_does_not_divide():
    (problem,) = problems(8, REPLICATE, "3")
    assert "8 processes cannot be divided by data_parallel_replicate_degree 3 = 3" in problem
    assert "degrees whose product divides 8" in problem


TENSOR = "--parallelism.tensor_parallel_degree"


@pytest.mark.parametrize(
    ("world_size", "arguments", "fix"),
    [
        (8, [TENSOR, "2", REPLICATE, "3"], "divides 8, or start a multiple of 6"),
        (6, [TENSOR, "4"], "degrees whose product divides 6, or start a multiple of 4 processes"),
        (1, [TENSOR, "4"], "divides 1, or start a multiple of 4 processes (to check: WORLD_SIZE)"),
        (6, [TENSOR, "4", SHARD, "2"], "degrees whose product divides 6, or start 8 processes"),
        (8, [TENSOR, "2", REPLICATE, "3", SHARD, "2"], "divides 8, or start 12 processes"),
    ],
)
def test_a_fix_of_the_mesh_makes_one(world_size: int, arguments: list[str], fix: str):
    (problem,) = problems(world_size, *arguments)
    assert fix in problem


def test_batch_numbers_and_nearest_valid_ones():
    batch = ["--training.local_batch_size", "4", "--training.global_batch_size", "20"]
    (problem,) = problems(2, *batch)
    assert "4 x 2 = 8" in problem
    assert "set it to a multiple, such as 24." in problem
    (problem,) = problems(3, *batch)
    assert "such as 24." in problem


def test_nothing_is_judged_on_a_broken_mesh():
    arguments = [REPLICATE, "3", "--training.global_batch_size", "7", "--training.dataset=stdlib"]
    (problem,) = problems(8, *arguments)
    assert "parallelism" in problem
    context = RunContext(load_config(arguments).config, 8, "cpu")
    assert list(map(str, errors_of(preflight(context, [ARITHMETIC])))) == [problem]
