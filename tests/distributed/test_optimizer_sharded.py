"""The optimizer on sharded parameters, some ranks having no part of one."""

from typing import Any

import pytest
import torch
from torch import nn
from torch.distributed.device_mesh import init_device_mesh
from torch.distributed.fsdp import fully_shard
from torch.distributed.tensor import DTensor, Shard, distribute_tensor

from tests.distributed import tiny
from tests.distributed.tiny import Case
from tests.parity.table import row
from tests.pool import GlooPool
from torchtitan.checkpoint.state import model_tensors, optimizer_tensors
from torchtitan.config.schema import Optimizer
from torchtitan.distributed.context import DistributedContext
from torchtitan.distributed.parallel_dims import ParallelDims
from torchtitan.optim.adafactor import sum_over_shards
from torchtitan.optim.optimizer import build_optimizers, step_optimizers
from torchtitan.parallel.grad_clip import clip_gradients, gradient_norm
from torchtitan.training import builder, model_builder

IMPLEMENTATIONS = ("for-loop", "foreach", "fused")
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


def train_sharded(world: DistributedContext, implementation: str) -> dict[str, torch.Tensor]:
    model = build()
    fully_shard(model, mesh=init_device_mesh("cpu", (world.world_size,)))
    return train(model, implementation, sharded=True)


@pytest.mark.parametrize("implementation", IMPLEMENTATIONS)
def test_sharded_steps_are_those_of_one_process(gloo_pool: GlooPool, implementation: str) -> None:
    expected = train(build(), implementation, sharded=False)
    for found in gloo_pool.run(4, train_sharded, implementation):
        assert found.keys() == expected.keys()
        for name, value in expected.items():
            torch.testing.assert_close(found[name], value, rtol=1e-6, atol=1e-7, msg=name)


def of(implementation: str) -> dict[str, dict[str, Any]]:
    return {"optimizer": {"lr": 1e-2, "implementation": implementation}}


@pytest.mark.parametrize("implementation", IMPLEMENTATIONS)
def test_parameters_cut_in_different_ways(
    gloo_pool: GlooPool, one_process, implementation: str
) -> None:
    """By rows, by columns, twice, or not at all: all in one optimizer."""
    case = row(of(implementation), shard=2, tp=2)
    found = gloo_pool.run(4, tiny.train, case)
    assert tiny.compare(found, one_process(row(of(implementation)))).worst < 1e-9


def step_with_nan(world: DistributedContext, case: Case) -> tuple[bool, bool, int]:
    """One gradient element of the last rank's is not a number: what this rank makes of it, whether
    its weights stay, and how many moments are other than zero."""
    config = case.config()
    dims = ParallelDims.from_section(config.parallelism, world.world_size)
    mesh = dims.build_mesh("cpu")
    model = model_builder.build_model(config, tiny.VOCAB_SIZE, mesh, dims, world.device)
    runner = builder.build_runner(config, model, mesh, dims, world.device)
    optimizers = build_optimizers(
        config.optimizer, model.parts, world.device, model.parameter_names
    )
    tensors = model_tensors(model.parts)
    before = {name: local(tensor).clone() for name, tensor in tensors.items()}
    state = optimizer_tensors(model.parts, optimizers)
    loss = runner.forward_backward(tiny.microbatches_of(case, dims, world.rank), 100)
    if world.rank == world.world_size - 1:
        local(model.parameters[-1].grad).view(-1)[0] = torch.nan
    norm = gradient_norm(model.parameters, dims.ranks_per_stage)
    clip_gradients(model.parameters, norm, 1.0)
    is_finite = torch.isfinite(norm) & torch.isfinite(loss)
    step_optimizers(optimizers, is_finite)
    unchanged = all(torch.equal(local(tensors[name]), value) for name, value in before.items())
    return bool(is_finite), unchanged, sum(bool(local(t).any()) for t in state.values())


def local(tensor: Any) -> torch.Tensor:
    return tensor.to_local() if isinstance(tensor, DTensor) else tensor


@pytest.mark.parametrize("implementation", IMPLEMENTATIONS)
def test_all_stages_leave_out_a_step_that_is_not_finite_in_one(
    gloo_pool: GlooPool, implementation: str
) -> None:
    case = row(of(implementation), tp=2, pp=2, layers=4, schedule="ZBVZeroBubble")
    assert gloo_pool.run(4, step_with_nan, case) == [(False, True, 0)] * 4


def _sums_beside_others(world: DistributedContext) -> bool:
    mesh = init_device_mesh("cpu", (world.world_size,))
    torch.manual_seed(world.rank)
    tied, first, last = torch.randn(9001), torch.randn(4001), torch.randn(7001)
    parameters = {
        len(values): distribute_tensor(torch.zeros(len(values) - 1, 1), mesh, [Shard(0)])
        for values in (tied, first, last)
    }

    def total(*values: torch.Tensor) -> list[torch.Tensor]:
        return sum_over_shards(values, [parameters[len(v)] for v in values])

    return torch.equal(total(tied, first)[0], total(last, tied)[1])


def test_sums_over_shards_do_not_depend_on_other_parameters(gloo_pool: GlooPool) -> None:
    """Two pipeline stages with copies of one weight would drift apart."""
    assert all(gloo_pool.run(4, _sums_beside_others))
