"""Digests of gradients: the same however a gradient is cut, others for other gradients."""

import pytest
import torch
from torch import Tensor, nn
from torch.distributed.device_mesh import init_device_mesh
from torch.distributed.tensor import DTensor, Replicate, Shard, distribute_tensor

from tests.pool import GlooPool
from torchtitan.distributed.context import DistributedContext
from torchtitan.parallel import initialize
from torchtitan.parallel.digest import Digest
from torchtitan.parallel.gradient_digest import GradientDigests

NAMES = ("w", "frozen", "elsewhere")
SHAPE = (131, 6)
"""Uneven over 2 and over 4 ranks."""


def whole(dtype: torch.dtype = torch.float32) -> Tensor:
    return torch.randn(SHAPE, dtype=torch.float64, generator=torch.manual_seed(1)).to(dtype)


def with_gradient(gradient: Tensor) -> nn.Parameter:
    parameter = nn.Parameter(torch.zeros_like(gradient))
    parameter.grad = gradient
    return parameter


def digests_of(world: DistributedContext, gradient: Tensor) -> dict[str, Digest]:
    """Digests of a model with one trained parameter, and one that only the last rank holds."""
    named = [("w", with_gradient(gradient)), ("w", with_gradient(gradient))]
    named.append(("frozen", nn.Parameter(torch.zeros(3), requires_grad=False)))
    if world.rank == world.world_size - 1:
        named.append(("elsewhere", with_gradient(torch.ones(5))))
    return dict(GradientDigests(world, named, NAMES).take())


def digests_of_cuts(world: DistributedContext, dtype: torch.dtype) -> list[dict[str, Digest]]:
    mesh = init_device_mesh("cpu", (2, 2), mesh_dim_names=("replicate", "shard"))
    flat = init_device_mesh("cpu", (4,), mesh_dim_names=("flat",))
    gradient = whole(dtype)
    cuts: list[Tensor] = [gradient]  # as DDP has it
    for device_mesh, placements in (
        (flat, [Shard(0)]),
        (flat, [Shard(1)]),
        (mesh, [Replicate(), Shard(0)]),
        (mesh, [Shard(1), Replicate()]),
        (mesh, [Shard(0), Shard(0)]),
        (mesh, [Shard(0), Shard(1)]),
        (mesh["shard"], [Shard(0)]),
    ):
        cuts.append(distribute_tensor(gradient, device_mesh, placements))
    return [digests_of(world, cut) for cut in cuts]


@pytest.mark.parametrize("dtype", [torch.float32, torch.float64, torch.bfloat16], ids=str)
def test_every_cut_has_the_same_digest(dtype: torch.dtype, gloo_pool: GlooPool) -> None:
    """And that is the digest that one process computes of all elements at once."""
    for found in gloo_pool.run(4, digests_of_cuts, dtype):
        first, *others = found
        assert first.keys() == {"w", "elsewhere"}
        for other in others:
            assert {name: entry.bits for name, entry in other.items()} == {
                name: entry.bits for name, entry in first.items()
            }
            assert other["w"].difference(first["w"]) < 1e-14
        assert first["w"].norm == pytest.approx(whole(dtype).double().norm().item(), rel=1e-14)
        assert first["elsewhere"].norm == pytest.approx(5**0.5)


def digests_of_changes(world: DistributedContext) -> dict[str, Digest]:
    gradient = whole()
    found = {"first": gradient, "again": gradient.clone()}
    found["changed"] = gradient.clone()
    last = found["changed"][130, 5:].view(torch.int32)
    last += 1  # its last bit
    found["swapped"] = gradient.clone()
    found["swapped"][[7, 8]] = gradient[[8, 7]]
    found["reversed"] = gradient.flip(1)
    found["negative"] = -gradient
    found["scaled"] = gradient * 1.001
    found["rounded"] = gradient * (1 + 1e-7 * torch.randn(SHAPE, generator=torch.manual_seed(2)))
    found["without_row"] = gradient.clone()
    found["without_row"][50] = 0
    found["nan"] = gradient.clone()
    found["nan"][3, 3] = torch.nan
    return {name: digests_of(world, each)["w"] for name, each in found.items()}


def test_other_gradients_have_other_digests(gloo_pool: GlooPool) -> None:
    (found,) = gloo_pool.run(1, digests_of_changes)
    first = found.pop("first")
    assert found.pop("again") == first
    apart = {name: first.difference(digest) for name, digest in found.items()}
    assert all(digest.bits != first.bits for digest in found.values())
    assert apart["changed"] < 1e-6 and apart["rounded"] < 1e-6
    assert apart["scaled"] == pytest.approx(1e-3, rel=0.01)
    assert apart["nan"] == float("inf")
    assert min(apart[name] for name in ("swapped", "reversed", "negative", "without_row")) > 0.01


def digests_of_signs(world: DistributedContext) -> list[Digest]:
    gradient = whole(torch.float64)
    other, zero = gradient.clone(), torch.zeros_like(gradient)
    other[:2, 0] *= -1
    return [digests_of(world, each)["w"] for each in (gradient, other, zero, -zero)]


def test_two_signs_do_not_cancel(gloo_pool: GlooPool) -> None:
    """In float64, where an odd weight leaves the topmost bit where it is."""
    ((one, other, zero, negative_zero),) = gloo_pool.run(1, digests_of_signs)
    assert one.bits != other.bits
    assert zero.bits != negative_zero.bits and zero.difference(negative_zero) == 0


def parts_of_a_large_gradient(world: DistributedContext) -> tuple[int, int]:
    """In one piece, and in pieces of a few rows."""
    gradient = DTensor.from_local(whole(), init_device_mesh("cpu", (1,)), [Shard(0)])
    bits = [digests_of(world, gradient)["w"].bits]
    chunk, initialize._CHUNK = initialize._CHUNK, 20
    bits.append(digests_of(world, gradient)["w"].bits)
    initialize._CHUNK = chunk
    return bits[0], bits[1]


def test_pieces_have_the_digest_of_the_whole(gloo_pool: GlooPool) -> None:
    ((one, pieces),) = gloo_pool.run(1, parts_of_a_large_gradient)
    assert one == pieces
