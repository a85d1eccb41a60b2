"""Finding what is not finite, on this rank and on any."""

import math

import pytest
import torch
from torch import Tensor
from torch.distributed.device_mesh import init_device_mesh
from torch.distributed.tensor import Shard, distribute_tensor

from tests.pool import GlooPool
from torchtitan.distributed.context import DistributedContext
from torchtitan.distributed.finiteness import non_finite, non_finite_on_any_rank
from torchtitan.utils.text import some_of

FLOATS = [torch.float16, torch.bfloat16, torch.float32, torch.float64, torch.float8_e4m3fn]


def holding(value: float, dtype: torch.dtype) -> Tensor:
    return torch.tensor([[1.0, value], [-2.0, 0.0]]).to(dtype)


@pytest.mark.parametrize("dtype", [*FLOATS, torch.complex64], ids=str)
@pytest.mark.parametrize("value", [math.nan, math.inf, -math.inf])
def test_each_kind_of_number_is_found(dtype: torch.dtype, value: float) -> None:
    if dtype == torch.float8_e4m3fn:
        value = math.nan  # it has no infinity
    tensors = {"good": holding(3.0, dtype), "bad": holding(value, dtype)}
    assert non_finite(tensors) == ["bad"]
    assert non_finite(tensors, {"bad"}) == (["bad"] if math.isnan(value) else [])


def test_what_is_finite_is_not_named() -> None:
    extremes = {
        str(dtype): torch.tensor([torch.finfo(dtype).max, torch.finfo(dtype).min], dtype=dtype)
        for dtype in FLOATS
    }
    others = {"empty": torch.empty(0), "codes": torch.tensor([255]), "flag": torch.tensor(True)}
    assert non_finite(extremes | others) == []


def test_names_are_listed_in_order_and_shortened() -> None:
    tensors = {name: holding(math.nan, torch.float32) for name in "edcba"}
    assert some_of(non_finite(tensors)) == "e, d, c, and 2 more"
    assert some_of(["a"]) == "a"


def on_ranks(world: DistributedContext) -> list[list[str]]:
    """A DTensor of 3 rows over 4 ranks, the last of which holds none; rank 2 alone has a NaN."""
    mesh = init_device_mesh("cpu", (world.world_size,))
    whole = torch.ones(3, 2)
    whole[2, 1] = math.nan
    sharded = {"sharded": distribute_tensor(whole, mesh, [Shard(0)])}
    mine = {f"of rank {world.rank}": torch.tensor([math.inf if world.rank == 1 else 0.0])}
    found = [non_finite(sharded), non_finite_on_any_rank(world, {**sharded, **mine})]
    return [*found, non_finite_on_any_rank(world, mine if world.rank != 1 else {})]


def test_all_ranks_name_the_same(gloo_pool: GlooPool) -> None:
    ranks = gloo_pool.run(4, on_ranks)
    assert [found for found, _, _ in ranks] == [[], [], ["sharded"], []]
    assert [found for _, found, _ in ranks] == [["of rank 1", "sharded"]] * 4
    assert [found for _, _, found in ranks] == [[]] * 4
