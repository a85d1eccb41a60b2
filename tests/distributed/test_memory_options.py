"""Options that save memory change nothing else: losses, norms, weights and moments, bit for bit."""

from pathlib import Path
from typing import Any, NamedTuple
from unittest import mock

import pytest
import torch
from torch import Tensor
from torch.distributed.fsdp import CPUOffloadPolicy, fully_shard
from torch.distributed.tensor import DTensor

from tests.distributed import runs, tiny
from tests.distributed.tiny import Case
from tests.parity.table import (
    BOTH,
    BY_OPERATOR,
    COMPILED,
    EVERY_SECOND,
    FULL,
    INDUCTOR,
    PACKED,
    RING,
    TIED,
    row,
)
from tests.pool import GlooPool
from torchtitan.checkpoint.state import model_tensors, optimizer_tensors
from torchtitan.distributed.context import DistributedContext
from torchtitan.distributed.parallel_dims import ParallelDims
from torchtitan.optim.lr_scheduler import set_learning_rates
from torchtitan.optim.optimizer import build_optimizers
from torchtitan.parallel import activation_offload, data_parallel, parallelize
from torchtitan.parallel.activation_offload import _Saved
from torchtitan.parallel.compile import apply_compile
from torchtitan.training import builder, model_builder

CPU_OFFLOAD = {"training": {"enable_cpu_offload": True}}
EARLY = {"optimizer": {"early_step_in_backward": True}}
OFFLOAD = {"activation_checkpoint": {"offload": True}}
UNITS = {"parallelism": {"fsdp_reshard_after_forward": "always"}}
WHOLE_BATCH = {"parallelism": {"pipeline_parallel_microbatch_size": 8}}
LEARNING_RATES = (0.01, 0.003, 0.02)


class Trained(NamedTuple):
    losses: list[float]
    norms: list[float]
    tensors: dict[str, Tensor]
    """What this rank holds of weights and moments."""
    most_gradients: int
    """That existed at the same time when a parameter's was ready."""
    left_gradients: int
    """That existed after the backward."""
    is_offloaded: bool
    num_copied: int
    """Tensors of activations that were copied to the host."""
    budgets: set[float | None]
    """Memory budgets that blocks were compiled with."""


def train(world: DistributedContext, case: Case) -> Trained:
    """With torch's kernels in inductor's graphs: its own take a compiler a minute.

    Which tensors a graph keeps is settled before either is chosen.
    """
    with torch._inductor.config.patch(fallback_by_default=True):
        return train_steps(world, case)


def train_steps(world: DistributedContext, case: Case) -> Trained:
    torch._dynamo.reset()
    config = case.config()
    dims = ParallelDims.from_section(config.parallelism, world.world_size)
    mesh = dims.build_mesh("cpu")
    with (
        mock.patch.object(data_parallel, "fully_shard", wraps=fully_shard) as sharding,
        mock.patch.object(parallelize, "apply_compile", wraps=apply_compile) as compiling,
    ):
        model = model_builder.build_model(config, tiny.VOCAB_SIZE, mesh, dims, world.device)
    optimizers = build_optimizers(
        config.optimizer, model.parts, world.device, model.parameter_names
    )
    counts = []
    parameters = model.parameters
    hooks = [
        parameter.register_post_accumulate_grad_hook(
            lambda _: counts.append(sum(p.grad is not None for p in parameters))
        )
        for parameter in parameters
    ]
    update = builder.build_update(config, model, optimizers, dims)
    runner = builder.build_runner(config, model, mesh, dims, world.device)
    batches = tiny.microbatches_of(case, dims, world.rank)
    losses, norms, left = [], [], 0
    for lr in LEARNING_RATES:
        set_learning_rates(optimizers, lr)
        with mock.patch.object(activation_offload, "_Saved", wraps=_Saved) as copying:
            losses.append(runner.forward_backward(batches, 100).item())
        left = max(left, sum(parameter.grad is not None for parameter in parameters))
        norms.append(update.gradient_norm().item())
        update.step(torch.tensor(True))
        for optimizer in optimizers:
            optimizer.zero_grad()
    for hook in hooks:
        hook.remove()  # Python's collector does not see that a parameter has hooks
    tensors = model_tensors(model.parts) | optimizer_tensors(model.parts, optimizers)
    held = {
        name: (tensor.to_local() if isinstance(tensor, DTensor) else tensor).clone()
        for name, tensor in tensors.items()
    }
    policies = [call.kwargs["offload_policy"] for call in sharding.call_args_list]
    offloaded = [isinstance(policy, CPUOffloadPolicy) for policy in policies]
    budgets = {call.args[1] for call in compiling.call_args_list}
    copied = copying.call_count
    return Trained(losses, norms, held, max(counts), left, any(offloaded), copied, budgets)


def assert_same(found: list[Trained], expected: list[Trained]) -> None:
    for rank, other in zip(found, expected, strict=True):
        assert rank.losses == other.losses
        assert rank.norms == other.norms
        assert rank.tensors.keys() == other.tensors.keys()
        for name, tensor in rank.tensors.items():
            assert torch.equal(tensor, other.tensors[name]), name


PLAIN: dict[str, list[Trained]] = {}
"""By row: what it trains without options, compiled once."""


def both(pool: GlooPool, *options: dict[str, Any], **case: Any) -> list[Trained]:
    """Train a row of the parity table with the options and without; compare; the former."""
    settings, others = case.pop("settings", []), case.pop("without", [])
    with_options = row(*settings, *options, **case)
    without = row(*settings, *others, **case)
    if repr(without) not in PLAIN:
        PLAIN[repr(without)] = pool.run(without.world_size, train, without)
    expected = PLAIN[repr(without)]
    found = pool.run(with_options.world_size, train, with_options)
    assert_same(found, expected)
    assert expected[0].left_gradients > 0 and not expected[0].is_offloaded
    assert expected[0].num_copied == 0 and expected[0].budgets == {None}
    return found


@pytest.mark.parametrize(
    "case",
    [
        {"without": [UNITS], **BOTH},
        {"shard": 2, "microbatches": 2},
        {"shard": 2, "tp": 2, "settings": [FULL], **TIED},
        {"replicate": 2, "shard": 2, "settings": [BY_OPERATOR]},
        {"cp": 2, "settings": [COMPILED]},
        {"pp": 2, "shard": 2, "schedule": "1F1B"},
    ],
    ids=["one process", "fsdp", "tp", "hsdp", "cp", "pp"],
)
def test_cpu_offload(gloo_pool: GlooPool, case: dict[str, Any]) -> None:
    for rank in both(gloo_pool, CPU_OFFLOAD, **case):
        assert rank.is_offloaded


@pytest.mark.parametrize(
    "case",
    [
        {"without": [UNITS], **BOTH},
        {"shard": 2, **TIED},
        {"shard": 2, "tp": 2, "settings": [BY_OPERATOR]},
        {"replicate": 2, "settings": [FULL]},
        {"replicate": 2, "shard": 2},
        {"cp": 2, "settings": [COMPILED, RING]},
        {"pp": 2, "schedule": "GPipe", "settings": [WHOLE_BATCH]},
        {"pp": 2, "shard": 2, "schedule": "GPipe", "settings": [WHOLE_BATCH], **TIED},
    ],
    ids=["one process", "fsdp", "tp", "ddp", "hsdp", "cp", "pp", "tied pp"],
)
def test_early_steps(gloo_pool: GlooPool, case: dict[str, Any]) -> None:
    for rank in both(gloo_pool, EARLY, **case):
        tied = int("pp" in case and "tied" in case)  # its gradients are added after the backward
        assert 1 <= rank.most_gradients <= 1 + tied and rank.left_gradients == tied


@pytest.mark.parametrize("implementation", ["for-loop", "foreach", "fused"])
def test_early_steps_of_every_implementation(gloo_pool: GlooPool, implementation: str) -> None:
    chosen = {"optimizer": {"implementation": implementation}}
    both(gloo_pool, EARLY, shard=2, settings=[chosen])


@pytest.mark.parametrize(
    "case",
    [
        {"settings": [EVERY_SECOND], "microbatches": 2, **BOTH},
        {"shard": 2, "settings": [FULL], **PACKED},
        {"shard": 2, "tp": 2},
        {"cp": 2, "settings": [RING], **PACKED},
        {"pp": 2, "schedule": "1F1B"},
        {"shard": 2, "settings": [COMPILED]},
        {"settings": [INDUCTOR]},
    ],
    ids=["one process", "fsdp", "tp", "cp", "pp", "compiled", "inductor"],
)
def test_activation_offload(gloo_pool: GlooPool, case: dict[str, Any]) -> None:
    for rank in both(gloo_pool, OFFLOAD, **case):
        assert rank.num_copied > 0


@pytest.mark.parametrize("budget", [0.0, 0.5])
def test_memory_budget(gloo_pool: GlooPool, budget: float) -> None:
    options = {"activation_checkpoint": {"mode": "memory_budget", "memory_budget": budget}}
    for rank in both(gloo_pool, options, shard=2, settings=[COMPILED]):
        assert rank.budgets == {budget}


def test_all_of_them(gloo_pool: GlooPool) -> None:
    options = {"activation_checkpoint": {"mode": "memory_budget", "offload": True}}
    found = both(gloo_pool, options, CPU_OFFLOAD, EARLY, shard=2, tp=2, settings=[COMPILED])
    assert found[0].is_offloaded and found[0].left_gradients == 0
    assert found[0].num_copied > 0 and found[0].budgets == {0.5}


ALL_IN_RUNS = (
    "--optimizer.early_step_in_backward",
    "--training.enable_cpu_offload",
    "--activation_checkpoint.offload",
)
RUN = (
    "--training.global_batch_size=2",
    "--training.max_norm=inf",
    "--lr_scheduler.decay_ratio=0",  # or more steps would change the first ones
)


def test_a_run_goes_on_with_other_options(tmp_path: Path) -> None:
    runs.run(tmp_path / "plain", *RUN)
    runs.run(tmp_path / "changing", *RUN, *ALL_IN_RUNS, "--training.steps=6")
    runs.run(tmp_path / "changing", *RUN)
    assert runs.curve(tmp_path / "changing") == runs.curve(tmp_path / "plain")


def test_an_early_step_that_is_not_finite_is_not_saved(tmp_path: Path) -> None:
    """The first update, made in the backward, makes the weights too large for the second."""
    options = ("--optimizer.lr=1e30", "--checkpoint.interval=1", "--lr_scheduler.warmup_steps=0")
    done = runs.run(tmp_path / "run", *RUN, *ALL_IN_RUNS, *options, expect=5)
    assert "early_step_in_backward it has changed the weights" in done.stderr
    failed = runs.status(tmp_path / "run")["step"] + 1
    saved = [folder.name for folder in (tmp_path / "run" / "checkpoint").glob("step-*")]
    assert f"step {failed}: the loss or the gradient norm" in done.stderr
    assert f"step-{failed}" not in saved
