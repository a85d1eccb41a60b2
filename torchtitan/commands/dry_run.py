"""A dry run: one training step of any rank of any mesh, in this process alone.

Most of what fails at scale fails in the first step: a degree that does not divide a shape, an
operator that cannot take a sharded tensor, a stage without layers. The functions that `train` calls
build the model and run the step, on *fake* tensors (shapes and types without content), so a rank of
a 405B model fits in a laptop. The process group is fake too: its collectives return at once.

A dry run cannot see what depends on values or on other ranks: the data, the loss, speed, deadlocks,
and the memory of activations.
"""

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
from torchtitan.parallel.grad_clip import clip_gradients
from torchtitan.parallel.pipeline.runner import PipelineRunner
from torchtitan.training import builder, model_builder
from torchtitan.training.frozen_model import FrozenModelRunner
from torchtitan.training.model_builder import BuiltModel
from torchtitan.utils.device import memory_peak
from torchtitan.utils.dtypes import torch_dtype
from torchtitan.utils.text import format_bytes
from torchtitan.utils.torch_compat import local_tensor

T = TypeVar("T")

STAND_IN_VOCAB_SIZE = 128256
"""Used when neither the tokenizer nor the model's flavor gives a size."""
_DEVICE = torch.device("cpu")
_MIB = 2**20


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
    """Elements of the whole model."""
    num_parameters: int
    parameter_bytes: int
    gradient_bytes: int
    optimizer_bytes: int
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
        model = model_builder.build_model(
            config, vocab_size, mesh, dims, torch.device("meta"), initialise=False
        )
        traffic = Traffic(_axes(mesh, dims))
        with FakeTensorMode(allow_non_fake_inputs=True), traffic:
            for part in model.parts:
                part.to_empty(device=_DEVICE)
            held = [local_tensor(parameter) for parameter in model.parameters]
            optimizers = build_optimizers(
                config.optimizer, model.parts, _DEVICE, model.parameter_names
            )
            gradients = _step(context, model, optimizers, mesh, dims, batches)
            states = [
                local_tensor(tensor) for optimizer in optimizers for tensor in _state(optimizer)
            ]
    coordinate = mesh.get_coordinate()
    assert coordinate is not None
    return DryRun(
        rank=rank,
        dims=dims,
        coordinate=dict(zip(AXES, coordinate, strict=True)),
        vocab_size=vocab_size,
        parts=_parts(model, coordinate[0]),
        total_parameters=model.num_parameters,
        num_parameters=sum(tensor.numel() for tensor in held),
        parameter_bytes=_bytes(held),
        gradient_bytes=_bytes(gradients),
        optimizer_bytes=_bytes(states),
        accumulated_bytes=_accumulated_bytes(context, model, dims),
        num_microbatches=len(batches),
        traffic=traffic,
        seconds=time.perf_counter() - start,
    )


def _step(
    context: RunContext,
    model: BuiltModel,
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
        own = FrozenModelRunner(runner, runner)  # the model is its own frozen model
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


def _state(optimizer: torch.optim.Optimizer) -> Iterator[Tensor]:
    for state in optimizer.state.values():
        yield from (value for value in state.values() if isinstance(value, Tensor))


def _bytes(tensors: Iterable[Tensor]) -> int:
    return sum(tensor.nbytes for tensor in tensors)


def report(result: DryRun, context: RunContext) -> str:
    """Return the lines to print: what the rank holds and exchanges."""
    model = context.config.model
    share = result.num_parameters / result.total_parameters
    peak = memory_peak(_DEVICE).reserved_gib
    lines = [
        ("dry run", f"a step of {model.name} {model.flavor} runs on rank {result.rank}"),
        ("processes", f"{context.world_size}: {result.dims.describe()}"),
        ("rank", _coordinate(result)),
        *(("holds", f"{part}: {_listed(names)}") for part, names in result.parts.items()),
        ("vocabulary", f"{result.vocab_size}"),
        (
            "parameters",
            f"{result.num_parameters:,} of {result.total_parameters:,} ({share:.3%})",
        ),
        ("memory", _memory(result)),
        ("step", f"{context.describe_batch()}, of which {result.num_microbatches} ran"),
        *(("traffic", line) for line in _traffic(result)),
        ("took", f"{result.seconds:.1f} s and {peak:.2f} GiB on this machine"),
    ]
    if "compile" in model.handlers:
        lines.append(("compile", "blocks were traced (aot_eager), no code was generated"))
    return "\n".join(f"{name:<11} {text}" for name, text in lines)


def _coordinate(result: DryRun) -> str:
    degrees = result.dims
    at = [f"{axis} {n}" for axis, n in result.coordinate.items() if getattr(degrees, axis) > 1]
    return f"{result.rank}: {', '.join(at) or 'the only one'}"


def _listed(names: list[str]) -> str:
    """Shorten a long list to its ends."""
    shown = names if len(names) <= 5 else [*names[:2], "...", *names[-2:]]
    return ", ".join(shown)


def _memory(result: DryRun) -> str:
    sizes = {
        "parameters": result.parameter_bytes,
        "gradients": result.gradient_bytes,
        "optimizer": result.optimizer_bytes,
    }
    terms = " + ".join(f"{name} {format_bytes(size)}" for name, size in sizes.items())
    more = "activations"
    if result.accumulated_bytes:
        more += f", and {format_bytes(result.accumulated_bytes)} of gradients not yet reduced"
    return f"{terms} = {format_bytes(sum(sizes.values()))}; besides {more}"


def _traffic(result: DryRun) -> list[str]:
    """Return a line for each kind of collective along each axis."""
    traffic = result.traffic
    width = max(len(axes) for axes, _ in [("along", ""), *traffic.calls])
    lines = [f"{'along':<{width}}  {'collective':<14} {'calls':>6} {'MiB':>12}"]
    for (axes, collective), calls in sorted(traffic.calls.items()):
        size = traffic.num_bytes[axes, collective] / _MIB
        lines.append(f"{axes:<{width}}  {collective:<14} {calls:>6} {size:>12,.1f}")
    lines += [f"and that of {name}, which depends on the data" for name in sorted(traffic.unknown)]
    return lines
