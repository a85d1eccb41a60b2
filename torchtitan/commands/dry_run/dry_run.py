"""One training step as any rank of any number of processes, in this process alone.

What fails at scale mostly fails at once: a shape that a degree does not divide, an operator that
does not know a sharded tensor, a stage without its layers. None of that needs a cluster to be seen.
Here the model is built, and a step run, by the functions that `train` uses, on *fake* tensors: they
have shapes and types and no content, so that a rank of a 405B model fits into a laptop. The process
group is fake too: it has the ranks of the real one, and its collectives return at once.

What a rehearsal cannot see is what depends on values or on other ranks: the data, the loss, speed,
a deadlock, and the memory that activations take.
"""

import math
import time
from collections.abc import Iterable, Iterator
from dataclasses import dataclass, replace
from typing import Any

import torch
import torch.distributed as dist
from torch import Tensor, nn
from torch._subclasses.fake_tensor import FakeTensorMode
from torch.distributed.device_mesh import DeviceMesh
from torch.distributed.tensor import DTensor, Shard
from torch.utils._python_dispatch import TorchDispatchMode

from torchtitan.commands.dry_run.traffic import Traffic
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
from torchtitan.training.model_builder import BuiltModel
from torchtitan.utils.dtypes import torch_dtype

STAND_IN_VOCAB_SIZE = 128256
"""Where neither a tokenizer nor the model's flavor gives one."""
_DEVICE = torch.device("cpu")


@dataclass(frozen=True)
class Rehearsal:
    """What a rank of the real run holds and exchanges."""

    rank: int
    dims: ParallelDims
    coordinate: dict[str, int]
    """The rank's place along each axis of the mesh."""
    vocab_size: int
    parts: dict[str, list[str]]
    """What each part of the model on this rank is, and its modules."""
    total_parameters: int
    """Of the whole model."""
    num_parameters: int
    """Elements on this rank, as are the following bytes."""
    parameter_bytes: int
    gradient_bytes: int
    optimizer_bytes: int
    accumulated_bytes: int
    """Of gradients that are not reduced before the last microbatch, and so are whole."""
    num_microbatches: int
    """Those that were run; the traffic is theirs, and the optimizer step's."""
    traffic: Traffic
    seconds: float


def rehearse(context: RunContext, rank: int) -> Rehearsal:
    """Build and run one step of the checked config as `rank` of `context.world_size` processes.

    Raises whatever would be raised in the real run.
    """
    start = time.perf_counter()
    context = replace(context, config=_without_kernels(context.config))
    config, dims = context.config, ParallelDims.from_context(context)
    vocab_size, batches = _vocab_size(config), _microbatches(context)
    with fake_world(rank, context.world_size):
        mesh = dims.build_mesh(_DEVICE.type)
        # Cut on `meta`: there, 4096 parts of a parameter are 4096 views and no fake tensors.
        model = model_builder.build_model(
            config, vocab_size, mesh, dims, torch.device("meta"), initialise=False
        )
        traffic = Traffic(_axes(mesh, dims))
        with FakeTensorMode(allow_non_fake_inputs=True), traffic:
            for part in model.parts:
                part.to_empty(device=_DEVICE)
            held = [_local(parameter) for parameter in model.parameters]
            optimizers = build_optimizers(
                config.optimizer, model.parts, _DEVICE, model.parameter_names
            )
            gradients = _step(context, model, optimizers, mesh, dims, batches)
            states = [_local(tensor) for optimizer in optimizers for tensor in _state(optimizer)]
    coordinate = mesh.get_coordinate()
    assert coordinate is not None
    return Rehearsal(
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
    """What `train` does in a step. Returns this rank's gradients."""
    training = context.config.training
    model_builder.call_after_load(model)
    update = builder.build_update(context.config, model, optimizers, dims)
    runner = builder.build_runner(context.config, model, mesh, dims, _DEVICE)
    if isinstance(runner, PipelineRunner):
        loss = torch.zeros((), device=_DEVICE)
        for batch in batches:
            runner.rehearse(batch)
    else:
        loss = runner.forward_backward(batches, context.global_batch_size * training.seq_len)
    norm = update.gradient_norm()
    clip_gradients(model.parameters, norm, training.max_norm)
    for handler in model.handlers:
        handler.pre_optimizer_hook(model.part_or_parts)
    gradients = [_local(p.grad) for p in model.parameters if p.grad is not None]
    with _ReadsGiveOne():
        update.step(torch.isfinite(norm) & torch.isfinite(loss))
    for handler in model.handlers:
        handler.post_optimizer_hook(model.part_or_parts)
    return gradients


class _ReadsGiveOne(TorchDispatchMode):
    """While entered, a value that the host asks for is 1, as fake tensors have none: the step is
    finite, and the first."""

    def __torch_dispatch__(
        self, func: Any, types: Any, args: tuple[Any, ...] = (), kwargs: Any = None
    ) -> Any:
        """What torch calls in the place of an operator."""
        if any(issubclass(kind, DTensor) for kind in types):
            return NotImplemented  # come again with what this does to local tensors
        if func is torch.ops.aten._local_scalar_dense.default:
            return 1.0 if args[0].dtype.is_floating_point else 1
        return func(*args, **(kwargs or {}))


def _vocab_size(config: JobConfig) -> int:
    """The tokenizer's; where its files are not, the model's or a stand-in."""
    model = config.model
    try:
        return build_tokenizer(model.tokenizer_path).vocab_size
    except ConfigError:
        size = get_family(model.name).resolve(model).vocab_size
    return STAND_IN_VOCAB_SIZE if size is None else size


def _without_kernels(config: JobConfig) -> JobConfig:
    """With the settings that handlers have for it: as `compile`, with which blocks are traced,
    forward and backward, as for the real run, but code for fake tensors does not exist."""
    tables = {
        name: {**config.handlers.get(name, {}), **HANDLERS[name].rehearsal}
        for name in config.model.handlers
    }
    return config.model_copy(update={"handlers": {**config.handlers, **tables}})


def _microbatches(context: RunContext) -> list[Batch]:
    """One of each kind: that only accumulates gradients, and the last of a step, which reduces
    them. In a pipeline one: there the schedule tells them apart."""
    training = context.config.training
    pipeline = context.config.parallelism.pipeline_parallel_degree > 1
    count = 1 if pipeline else min(2, context.accumulation_steps)
    names = ("tokens", "labels", "positions", "document_ids")
    shape = (training.local_batch_size, training.seq_len)
    return [
        Batch({name: torch.zeros(shape, dtype=torch.int64) for name in names}) for _ in range(count)
    ]


def _axes(mesh: DeviceMesh, dims: ParallelDims) -> dict[str, str]:
    """What to call each process group; one can serve several axes."""
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
    """Top-level modules that have parameters; of a list or dictionary each member."""
    split = [name.split(".") for name, _ in part.named_parameters()]
    return list(dict.fromkeys(".".join(n[: 2 if n[1:] and n[1].isdigit() else 1]) for n in split))


def _accumulated_bytes(context: RunContext, model: BuiltModel, dims: ParallelDims) -> int:
    """FSDP adds up gradients of the parameters that it has gathered, in the type of reduction."""
    num_microbatches = context.pipeline_microbatches if dims.pp > 1 else context.accumulation_steps
    if num_microbatches == 1:
        return 0
    itemsize = torch_dtype(context.config.training.mixed_precision_reduce).itemsize
    return itemsize * sum(_gathered_size(parameter) for parameter in model.parameters)


def _gathered_size(parameter: Tensor) -> int:
    """Elements of the parameter on this rank when it is not sharded over data ranks."""
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


def _local(tensor: Tensor) -> Tensor:
    """What this rank holds of it."""
    return tensor.to_local() if isinstance(tensor, DTensor) else tensor
