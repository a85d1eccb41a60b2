"""The gradient norm in itself: shards of uneven sizes, copies, and meshes that are mixed."""

import pytest
import torch
from torch.distributed.device_mesh import init_device_mesh
from torch.distributed.tensor import Replicate, Shard, distribute_tensor

from tests.pool import GlooPool
from torchtitan.distributed.context import DistributedContext
from torchtitan.parallel.grad_clip import StreamingGradNorm, gradient_norm


def test_gradients_of_uneven_shards_have_one_norm(gloo_pool: GlooPool) -> None:
    """131 rows over 4 ranks: shards of 33, 33, 33 and 32."""
    norms = gloo_pool.run(4, _norm_of_known_gradients)
    expected = torch.arange(131 * 3, dtype=torch.float64).norm().item()
    assert norms == pytest.approx([expected] * 4, rel=1e-14)


def test_the_norm_of_passing_gradients_is_the_same(gloo_pool: GlooPool) -> None:
    """Bit for bit, in whatever order they pass; and a norm is that of one step."""
    for whole, passing, second in gloo_pool.run(4, _norms_of_passing_gradients):
        assert whole == passing == second > 0


def _norms_of_passing_gradients(world: DistributedContext) -> list[float]:
    parameters = _parameters_with_gradients()
    whole = gradient_norm(parameters, world.world_size)
    passing = StreamingGradNorm(world.world_size, world.device, torch.float32)
    norms = [whole.item()]
    for order in ((2, 0, 1), (1, 2, 0)):
        for index in order:
            gradient = parameters[index].grad
            assert gradient is not None
            passing.add(index, gradient)
        norms.append(passing.take().item())
    return norms


def _norm_of_known_gradients(world: DistributedContext) -> float:
    return gradient_norm(_parameters_with_gradients(), world.world_size).item()


def _parameters_with_gradients() -> list[torch.nn.Parameter]:
    whole = torch.arange(131 * 3, dtype=torch.float64).view(131, 3)
    mesh = init_device_mesh("cpu", (2, 2), mesh_dim_names=("replicate", "shard"))
    half = mesh["shard"]
    parameters = []
    for rows, device_mesh, placements in (
        (whole[:50], mesh, [Replicate(), Shard(0)]),
        (whole[50:90], half, [Shard(0)]),
        (whole[90:], mesh, [Replicate(), Replicate()]),
    ):
        tensor = distribute_tensor(rows, device_mesh, placements)
        parameter = torch.nn.Parameter(torch.zeros_like(tensor))
        parameter.grad = tensor
        parameters.append(parameter)
    return parameters
