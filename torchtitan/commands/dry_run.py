"""A dry run: one training step of any rank of any mesh, in this process alone.

Most of what fails at scale fails in the first step: a degree that does not divide a shape, an
operator that cannot take a sharded tensor, a stage without layers. The functions that `train` calls
build the model and run the step, on *fake* tensors (shapes and types without content), so a rank of
a 405B model fits in a laptop. The process group is fake too: its collectives return at once.

A dry run cannot see what depends on values or on other ranks: the data, the loss, speed, deadlocks,
and the memory of activations.
"""

import logging
import math
import time
from collections.abc import Callable, Iterable, Iterator
from dataclasses import dataclass, replace
from typing import Any, TypeVar

import torch
import torch.distributed as dist
from torch import Tensor, nn
from torch._subclasses.fake_tensor import FakeTensorMode
from torch.distributed.device_mesh import DeviceMesh
from torch.distributed.tensor import DTensor, Shard
from torch.utils._python_dispatch import TorchDispatchMode

from torchtitan.commands.traced_once import traced_once
from torchtitan.commands.traffic import Traffic
from torchtitan.config import ConfigError, JobConfig
from torchtitan.config.run_context import RunContext
from torchtitan.data.tokenizers import build_tokenizer
from torchtitan.distributed.context import fake_world
from torchtitan.distributed.parallel_dims import AXES, ParallelDims
from torchtitan.handlers.registry import HANDLERS
from torchtitan.models.batch import Batch
from torchtitan.models.registry import get_family
from torchtitan.optim.optimizer import build_optimizers
from torchtitan.parallel.compile import (
    apply_compile,
    is_marked_for_compile,
    mark_for_compile,
    memory_budget_of,
)
from torchtitan.parallel.grad_clip import clip_gradients
from torchtitan.parallel.pipeline.runner import PipelineRunner
from torchtitan.training import builder, model_builder
from torchtitan.training.frozen_model import FrozenModelRunner, config_of_copy
from torchtitan.training.model_builder import BuiltModel
from torchtitan.utils.dtypes import torch_dtype
from torchtitan.utils.torch_compat import local_tensor

logger = logging.getLogger(__name__)

T = TypeVar("T")

STAND_IN_VOCAB_SIZE = 128256
"""Used when neither the tokenizer nor the model's flavor gives a size."""
_DEVICE = torch.device("cpu")


@dataclass(frozen=True)
class DryRun:
    """The result: what one rank of the real run holds and exchanges. Sizes are of this rank."""

    rank: int
    dims: ParallelDims
    coordinate: dict[str, int]
    """The rank's place along each axis of the mesh."""
    vocab_size: int
    parts: dict[str, list[str]]
    """Modules of each part of the model on this rank, by the part's description."""
    total_parameters: int
    """Elements of the whole model, with those that handlers add."""
    trained_parameters: int
    """Those of them that are trained."""
    num_parameters: int
    """Elements on this rank; those of a quantised matrix are the matrix's."""
    parameter_bytes: int
    gradient_bytes: int
    optimizer_bytes: int
    frozen_bytes: int
    """Weights of the frozen model that the loss compares with, if it is another one."""
    accumulated_bytes: int
    """Unsharded gradients, which are kept until the last microbatch reduces them."""
    num_microbatches: int
    """Microbatches that ran; `traffic` counts these and the optimizer's step."""
    traffic: Traffic
    seconds: float


def dry_run(context: RunContext, rank: int) -> DryRun:
    """Build and run one step of the checked config as `rank` of `context.world_size` processes.

    Raises whatever the real run would raise.
    """
    start = time.perf_counter()
    context = replace(context, config=_without_kernels(context.config))
    config, dims = (
        context.config,
        ParallelDims.from_section(context.config.parallelism, context.world_size),
    )
    vocab_size, batches = _vocab_size(config), _microbatches(context)
    with fake_world(rank, context.world_size):
        mesh = dims.build_mesh(_DEVICE.type)
        # Shard on `meta`: there the 4096 shards of a parameter are views, not fake tensors.
        configs = [config, *_frozen_configs(config, vocab_size)]
        models = [
            model_builder.build_model(each, vocab_size, mesh, dims, torch.device("meta"), False)
            for each in configs
        ]
        model, frozen = models[0], list(zip(configs, models, strict=True))[1:]
        traffic = Traffic(_axes(mesh, dims))
        _compile_once(config, models, traffic)
        with FakeTensorMode(allow_non_fake_inputs=True), traffic:
            for part in (part for each in models for part in each.parts):
                part.to_empty(device=_DEVICE)
            held = [local_tensor(parameter) for parameter in model.parameters]
            optimizers = build_optimizers(
                config.optimizer, model.parts, _DEVICE, model.parameter_names
            )
            gradients = _step(context, model, frozen, optimizers, mesh, dims, batches)
            states = [
                local_tensor(tensor) for optimizer in optimizers for tensor in _state(optimizer)
            ]
    coordinate = mesh.get_coordinate()
    assert coordinate is not None
    return DryRun(
        rank=rank,
        dims=dims,
        coordinate=dict(zip(AXES, coordinate, strict=True)),
        vocab_size=model.args.vocab_size or vocab_size,
        parts=_parts(model, coordinate[0]),
        total_parameters=model.num_with_added,
        trained_parameters=model.num_trained,
        num_parameters=_num_held(model),
        parameter_bytes=_bytes(held),
        gradient_bytes=_bytes(gradients),
        optimizer_bytes=_bytes(states),
        frozen_bytes=_bytes(local_tensor(p) for _, other in frozen for p in other.parameters),
        accumulated_bytes=_accumulated_bytes(context, model, dims),
        num_microbatches=len(batches),
        traffic=traffic,
        seconds=time.perf_counter() - start,
    )


def _frozen_configs(config: JobConfig, vocab_size: int) -> list[JobConfig]:
    """Return the config of the frozen model that the loss compares with, if it is another one."""
    try:
        found = config_of_copy(config, vocab_size)
    except ConfigError as error:  # a teacher that is not on this machine
        for issue in error.problems:
            logger.warning("The frozen model is not counted: %s", issue)
        return []
    return [] if found is None else [found]


def _compile_once(config: JobConfig, models: list[BuiltModel], traffic: Traffic) -> None:
    """Compile blocks in a way that runs what they share once."""
    backend = traced_once(traffic)
    for part in (part for model in models for part in model.parts):
        blocks = part.blocks()  # type: ignore[operator]
        for block in filter(is_marked_for_compile, blocks.values()):
            mark_for_compile(block, backend)
        apply_compile(blocks, memory_budget_of(config.activation_checkpoint))


def _step(
    context: RunContext,
    model: BuiltModel,
    frozen: list[tuple[JobConfig, BuiltModel]],
    optimizers: list[torch.optim.Optimizer],
    mesh: DeviceMesh,
    dims: ParallelDims,
    batches: list[Batch],
) -> list[Tensor]:
    """Run the step as `train` does; return this rank's gradients."""
    training = context.config.training
    model_builder.call_after_load(model)
    if context.config.optimizer.early_step_in_backward:  # not around compiled blocks
        for optimizer in optimizers:
            optimizer.step = _reading_ones(optimizer.step)  # type: ignore[method-assign]
    update = builder.build_update(context.config, model, optimizers, dims)
    runner = builder.build_runner(context.config, model, mesh, dims, _DEVICE)
    if isinstance(runner, PipelineRunner):
        loss = torch.zeros((), device=_DEVICE)
        for batch in batches:
            runner.dry_run(batch)
    else:
        other = runner  # without a frozen model the model stands in for it
        for config, copy in frozen:
            model_builder.call_after_load(copy)
            for parameter in copy.parameters:
                parameter.requires_grad_(False)
            other = builder.build_runner(config, copy, mesh, dims, _DEVICE)
        own = FrozenModelRunner(runner, other)
        loss = own.forward_backward(batches, context.global_batch_size * training.seq_len)
    norm = update.gradient_norm()
    clip_gradients(model.parameters, norm, training.max_norm)
    for handler in model.handlers:
        handler.pre_optimizer_hook(model.part_or_parts)
    gradients = [local_tensor(p.grad) for p in model.parameters if p.grad is not None]
    with _ReadsGiveOne():
        update.step(torch.isfinite(norm) & torch.isfinite(loss))
    for handler in model.handlers:
        handler.post_optimizer_hook(model.part_or_parts)
    return gradients


class _ReadsGiveOne(TorchDispatchMode):
    """Answer 1 when the host reads a value, which fake tensors lack: the step is finite."""

    def __torch_dispatch__(
        self, func: Any, types: Any, args: tuple[Any, ...] = (), kwargs: Any = None
    ) -> Any:
        """Handle one operator call."""
        if any(issubclass(kind, DTensor) for kind in types):
            return NotImplemented  # called again for the local tensors
        if func is torch.ops.aten._local_scalar_dense.default:
            return 1.0 if args[0].dtype.is_floating_point else 1
        return func(*args, **(kwargs or {}))


def _reading_ones(function: Callable[..., T]) -> Callable[..., T]:
    """Return `function`, run under `_ReadsGiveOne`."""

    def run(*args: Any) -> T:
        with _ReadsGiveOne():
            return function(*args)

    return run


def _vocab_size(config: JobConfig) -> int:
    """Return the tokenizer's size or, without its files, the model's or a stand-in."""
    model = config.model
    try:
        return build_tokenizer(model.tokenizer_path).vocab_size
    except ConfigError:
        size = get_family(model.name).resolve(model).vocab_size
    return STAND_IN_VOCAB_SIZE if size is None else size


def _without_kernels(config: JobConfig) -> JobConfig:
    """Apply the handlers' settings for dry runs: `compile` traces blocks but generates no code."""
    tables = {
        name: {**config.handlers.get(name, {}), **HANDLERS[name].dry_run_settings}
        for name in config.model.handlers
    }
    return config.model_copy(update={"handlers": {**config.handlers, **tables}})


def _microbatches(context: RunContext) -> list[Batch]:
    """Return one batch that accumulates gradients and one that reduces them.

    One is enough for a pipeline, whose schedule does both.
    """
    training = context.config.training
    pipeline = context.config.parallelism.pipeline_parallel_degree > 1
    count = 1 if pipeline else min(2, context.accumulation_steps)
    names = ("tokens", "labels", "positions", "document_ids")
    shape = (training.local_batch_size, training.seq_len)
    return [
        Batch({name: torch.zeros(shape, dtype=torch.int64) for name in names}) for _ in range(count)
    ]


def _axes(mesh: DeviceMesh, dims: ParallelDims) -> dict[str, str]:
    """Name each process group after its axes: one group can serve several."""
    shard = dims.shard_mesh(mesh)
    assert shard.mesh_dim_names is not None
    meshes = {axis: mesh[axis] for axis in AXES} | {shard.mesh_dim_names[0]: shard}
    names: dict[str, str] = {}
    for axis, along in meshes.items():
        if along.size() > 1:
            group = along.get_group().group_name
            names[group] = f"{names[group]}, {axis}" if group in names else axis
    world = dist.group.WORLD
    assert world is not None
    return {world.group_name: "all", **names}


def _parts(model: BuiltModel, pipeline_rank: int) -> dict[str, list[str]]:
    if model.plan is None:
        return {"the whole model": _modules(model.parts[0])}
    count = len(model.plan.stages)
    names = [f"stage {stage} of {count}" for stage in model.plan.held_by(pipeline_rank)]
    return {name: _modules(part) for name, part in zip(names, model.parts, strict=True)}


def _modules(part: nn.Module) -> list[str]:
    """List top-level modules that have parameters, and the members of module lists."""
    split = [name.split(".") for name, _ in part.named_parameters()]
    return list(dict.fromkeys(".".join(n[: 2 if n[1:] and n[1].isdigit() else 1]) for n in split))


def _accumulated_bytes(context: RunContext, model: BuiltModel, dims: ParallelDims) -> int:
    """Return the size of the unsharded gradients that FSDP adds up, in the type of reduction."""
    num_microbatches = context.pipeline_microbatches if dims.pp > 1 else context.accumulation_steps
    if num_microbatches == 1:
        return 0
    itemsize = torch_dtype(context.config.training.mixed_precision_reduce).itemsize
    trained = (parameter for parameter in model.parameters if parameter.requires_grad)
    return itemsize * sum(map(_gathered_size, trained))


def _gathered_size(parameter: Tensor) -> int:
    """Count the elements on this rank of a parameter that FSDP has gathered."""
    shape = list(parameter.shape)
    if isinstance(parameter, DTensor):
        mesh = parameter.device_mesh
        for n, placement in enumerate(parameter.placements):
            if mesh.mesh_dim_names[n] == "tp" and isinstance(placement, Shard):
                shape[placement.dim] = -(-shape[placement.dim] // mesh.size(n))
    return math.prod(shape)


def _num_held(model: BuiltModel) -> int:
    """Count this rank's elements; those of a quantised matrix are the matrix's."""
    count = sum(local_tensor(parameter).numel() for parameter in model.parameters)
    for part in model.parts:
        named = dict(part.named_parameters())
        for made in (made for each in model.handlers for made in each.made_of(named).values()):
            count -= sum(local_tensor(named[name]).numel() for name in made.names)
            count += local_tensor(made.like).numel() * made.columns
    return count


def _state(optimizer: torch.optim.Optimizer) -> Iterator[Tensor]:
    for state in optimizer.state.values():
        yield from (value for value in state.values() if isinstance(value, Tensor))


def _bytes(tensors: Iterable[Tensor]) -> int:
    return sum(tensor.nbytes for tensor in tensors)
