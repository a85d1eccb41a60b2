"""The optimizer on sharded parameters, some ranks having no part of one."""

import pytest
import torch
from torch import nn
from torch.distributed.device_mesh import init_device_mesh
from torch.distributed.fsdp import fully_shard
from torch.distributed.tensor import distribute_tensor

from tests.pool import GlooPool
from torchtitan.components.optimizer import build_optimizers, step_optimizers
from torchtitan.config.training_sections import Optimizer
from torchtitan.distributed.world import World

IS_FINITE = [True, False, True]


def build() -> nn.Module:
    torch.manual_seed(0)
    # 5 rows over 4 ranks: 2, 2, 1 and 0.
    return nn.Sequential(nn.Linear(3, 5), nn.RMSNorm(5))


def gradient(param: torch.Tensor, step: int) -> torch.Tensor:
    generator = torch.Generator().manual_seed(step)
    return torch.randn(param.shape, generator=generator)


def train(model: nn.Module, implementation: str, sharded: bool) -> dict[str, torch.Tensor]:
    section = Optimizer(
        implementation=implementation, lr=0.1, param_groups=[{"pattern": "1.*", "lr_factor": 0.5}]
    )
    optimizers = build_optimizers(section, [model], torch.device("cpu"))
    for step, is_finite in enumerate(IS_FINITE):
        for param in model.parameters():
            full = gradient(param, step) if is_finite else torch.full(param.shape, float("nan"))
            param.grad = shard_like(full, param) if sharded else full
        step_optimizers(optimizers, torch.tensor(is_finite))
    params = {name: param.detach() for name, param in model.named_parameters()}
    return {n: p.full_tensor() if sharded else p for n, p in params.items()}


def shard_like(full: torch.Tensor, param: torch.Tensor) -> torch.Tensor:
    return distribute_tensor(full, param.device_mesh, param.placements)


def train_sharded(world: World, implementation: str) -> dict[str, torch.Tensor]:
    model = build()
    fully_shard(model, mesh=init_device_mesh("cpu", (world.world_size,)))
    return train(model, implementation, sharded=True)


@pytest.mark.parametrize("implementation", ["for-loop", "foreach", "fused"])
def test_sharded_steps_are_those_of_one_process(gloo_pool: GlooPool, implementation: str) -> None:
    expected = train(build(), implementation, sharded=False)
    for found in gloo_pool.run(4, train_sharded, implementation):
        assert found.keys() == expected.keys()
        for name, value in expected.items():
            torch.testing.assert_close(found[name], value, rtol=1e-6, atol=1e-7, msg=name)
