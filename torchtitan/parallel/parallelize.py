"""Everything done to a model between its construction and its first weights, in order."""

import logging
from collections.abc import Sequence

import torch
from torch import nn
from torch.distributed.device_mesh import DeviceMesh

from torchtitan.config import JobConfig
from torchtitan.distributed.parallel_dims import ParallelDims
from torchtitan.models.spec import LanguageModel, WrapUnit
from torchtitan.parallel.activation_checkpoint import apply_activation_checkpoint
from torchtitan.parallel.activation_offload import apply_activation_offload
from torchtitan.parallel.compile import apply_compile, memory_budget_of
from torchtitan.parallel.context.context_parallel import ContextParallel, apply_context_parallel
from torchtitan.parallel.data_parallel import apply_data_parallel
from torchtitan.parallel.tensor_parallel import PlanExtension, apply_tensor_parallel
from torchtitan.utils.dtypes import torch_dtype

logger = logging.getLogger(__name__)


def parallelize(
    model: nn.Module,
    config: JobConfig,
    mesh: DeviceMesh,
    dims: ParallelDims,
    plan_extensions: Sequence[PlanExtension] = (),
) -> None:
    """Change `model` (on the meta device) in place for this rank of the mesh.

    `plan_extensions` change how tensor parallelism cuts it.
    """
    assert isinstance(model, LanguageModel)
    # First, since everything else is done to the modules, and parameters, that this makes.
    if dims.tp > 1:
        overlap = config.parallelism.enable_async_tensor_parallel
        apply_tensor_parallel(model, mesh["tp"], overlap=overlap, extensions=plan_extensions)
    if dims.cp > 1:
        apply_context_parallel(model, ContextParallel.from_section(config.parallelism, mesh["cp"]))
    # One that has several names is changed once.
    names = {block: name for name, block in reversed(model.blocks().items())}
    blocks = {name: block for block, name in reversed(names.items())}
    # Inside compile, so that the compiler sees what is recomputed; it plans memory by that.
    checkpointing = config.activation_checkpoint
    apply_activation_checkpoint(blocks, checkpointing)
    # By hooks around the blocks, so what checkpointing does not keep is not offloaded either.
    if checkpointing.offload:
        apply_activation_offload(blocks, torch.device(mesh.device_type))
    # Before data parallelism, whose hooks stay outside of the compiled graphs.
    apply_compile(blocks, memory_budget_of(checkpointing))
    training = config.training
    apply_data_parallel(
        model,
        _units(model, config, dims),
        mesh,
        dims,
        param_dtype=torch_dtype(training.mixed_precision_param),
        reduce_dtype=torch_dtype(training.mixed_precision_reduce),
        reshard_after_forward=_reshard_after_forward(config, dims),
        cpu_offload=training.enable_cpu_offload,
    )


def parallelize_for_inference(
    model: nn.Module,
    mesh: DeviceMesh,
    dims: ParallelDims,
    dtype: torch.dtype,
    plan_extensions: Sequence[PlanExtension] = (),
) -> None:
    """Shard `model` (on the meta device) in place to compute in `dtype`, without a backward."""
    assert isinstance(model, LanguageModel)
    if dims.tp > 1:
        apply_tensor_parallel(model, mesh["tp"], extensions=plan_extensions)
    if dims.shards > 1:
        apply_data_parallel(
            model,
            _without_shared(model.wrap_units(), model),
            mesh,
            dims,
            param_dtype=dtype,
            reduce_dtype=dtype,
            reshard_after_forward=True,
        )


def _units(model: LanguageModel, config: JobConfig, dims: ParallelDims) -> list[WrapUnit]:
    """Return the units to gather one by one; always the head if it alone is trained.

    FSDP hands on the gradients of a module once one has come to its output, and that of the model,
    hidden states, gets none then: the head's would be found by no optimizer.
    """
    units = model.wrap_units() if _needs_units(config, dims) else []
    units = _without_shared(units, model)  # type: ignore[arg-type]
    head = model.head
    if head is None or any(head in unit.modules for unit in units):
        return units
    inside = set(head.modules())
    others = [module for module in model.modules() if module not in inside]  # type: ignore[attr-defined]
    trained = (p.requires_grad for module in others for p in module.parameters(recurse=False))
    return units if any(trained) else [*units, WrapUnit("head", (head,))]


def _without_shared(units: list[WrapUnit], model: nn.Module) -> list[WrapUnit]:
    """Return the units that share no parameter with modules outside of them.

    FSDP takes each parameter once: a unit of its own would gather, and free, what another one uses.
    """
    inside: dict[nn.Module, list[int]] = {}
    for number, unit in enumerate(units):
        for module in unit.modules:
            inside.setdefault(module, []).append(number)
    uses: dict[nn.Parameter, set[tuple[int, ...]]] = {}

    def walk(module: nn.Module, around: tuple[int, ...]) -> None:
        around = (*around, *inside.get(module, ()))
        for parameter in module.parameters(recurse=False):
            uses.setdefault(parameter, set()).add(around)
        for child in module.children():
            walk(child, around)

    walk(model, ())
    shared = {number for use in uses.values() if len(use) > 1 for number in set().union(*use)}
    shared |= {number for numbers in inside.values() if len(numbers) > 1 for number in numbers}
    if shared:
        names = ", ".join(units[number].name for number in sorted(shared))
        logger.info("Gathered for the whole step, since they share parameters: %s", names)
    return [unit for number, unit in enumerate(units) if number not in shared]


def _needs_units(config: JobConfig, dims: ParallelDims) -> bool:
    """Return whether wrap units are gathered one by one.

    With nothing to gather a unit only costs the time of its hooks, unless memory is saved by
    having one at a time.
    """
    return (
        dims.dp_replicate * dims.shards > 1
        or config.parallelism.fsdp_reshard_after_forward != "default"
        or config.training.enable_cpu_offload
        or config.optimizer.early_step_in_backward
    )


def _reshard_after_forward(config: JobConfig, dims: ParallelDims) -> bool:
    policy = config.parallelism.fsdp_reshard_after_forward
    if policy == "default":
        return dims.pp == 1  # else every microbatch would gather the parameters again
    return policy == "always"
