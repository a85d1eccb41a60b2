"""Data parallelism: FSDP2, HSDP and DDP over the units that a model declares.

A single process is sharded too, over a mesh of one: then master weights, compute and reduction have
the same types everywhere. FSDP2 by default averages gradients over the data ranks. Here the loss of
every rank is already divided by the number of targets of the whole step, so gradients are summed:
the division is switched off on *every* wrapped module, since the setting does not reach children.
"""

from functools import partial

import torch
from torch import nn
from torch.distributed.device_mesh import DeviceMesh
from torch.distributed.fsdp import (
    CPUOffloadPolicy,
    FSDPModule,
    MixedPrecisionPolicy,
    OffloadPolicy,
    fully_shard,
)
from torch.distributed.tensor import DTensor, Shard

from torchtitan.distributed.parallel_dims import ParallelDims
from torchtitan.models.spec import WrapUnit
from torchtitan.utils.torch_compat import apply_replicate


def apply_data_parallel(
    model: nn.Module,
    units: list[WrapUnit],
    mesh: DeviceMesh,
    dims: ParallelDims,
    *,
    param_dtype: torch.dtype,
    reduce_dtype: torch.dtype,
    reshard_after_forward: bool,
    cpu_offload: bool = False,
) -> None:
    """Wrap `model` in place; names of parameters stay.

    Copies without shards are DDP, copies of shards HSDP, else FSDP. Forward and backward compute in
    `param_dtype`, gradients are summed over ranks in `reduce_dtype`. The unit that comes last in
    the forward is not freed after it, because the backward needs it at once. With `cpu_offload`
    (not for DDP) parameters, and so gradients and optimizer state, have to be put in host memory.
    """
    policy = MixedPrecisionPolicy(param_dtype=param_dtype, reduce_dtype=reduce_dtype)
    if dims.shards == 1 and dims.dp_replicate > 1:
        assert not cpu_offload, "refused by the check"
        for unit in units:
            apply_replicate(list(unit.modules), mesh["dp_replicate"], policy)
        apply_replicate([model], mesh["dp_replicate"], policy)
    else:
        dp_mesh = dims.shard_mesh(mesh)
        if dims.dp_replicate > 1:
            assert dp_mesh.mesh_dim_names is not None
            dp_mesh = mesh["dp_replicate", dp_mesh.mesh_dim_names[0]]
        offload = OffloadPolicy()
        if cpu_offload:  # page-locked memory is what CUDA copies to and from beside computing
            offload = CPUOffloadPolicy(pin_memory=mesh.device_type == "cuda")
        shard = partial(
            fully_shard,
            mesh=dp_mesh,
            mp_policy=policy,
            offload_policy=offload,
            shard_placement_fn=_dimension_to_shard,
        )
        for unit in units:
            keep = unit is units[-1] or not reshard_after_forward
            shard(list(unit.modules), reshard_after_forward=not keep)
        shard(model, reshard_after_forward=False)
    sum_gradients(model)


def _dimension_to_shard(parameter: nn.Parameter) -> Shard | None:
    """The first (None), but the second of a matrix whose rows tensor parallelism cuts unevenly.

    Rows cut unevenly a second time would end up where a DTensor's placements do not say: of 129
    rows, 65 and 64, over 4 ranks the last one holds none of the one part and 16 of the other.
    """
    if not isinstance(parameter, DTensor) or parameter.placements != (Shard(0),):
        return None
    return Shard(1) if parameter.size(0) % parameter.device_mesh.size() else None


def sum_gradients(model: nn.Module) -> None:
    """Make every wrapped module add gradients over ranks instead of averaging them."""
    for module in model.modules():
        if isinstance(module, FSDPModule):
            module.set_gradient_divide_factor(1.0)
            # With a factor of 1 some backends would otherwise use a pre-multiplied sum.
            module.set_force_sum_reduction_for_comms(True)


def set_gradient_sync(model: nn.Module, enabled: bool) -> None:
    """Switch the reduction of gradients in the next backward; off while microbatches accumulate."""
    if isinstance(model, FSDPModule):
        model.set_requires_gradient_sync(enabled)
        model.set_is_last_backward(enabled)


def free_gathered(model: nn.Module) -> None:
    """Free parameters that a forward without a backward has left gathered.

    Until then `parameters()` would give the gathered tensors, which no optimizer knows.
    """
    for module in model.modules():
        if isinstance(module, FSDPModule):
            module.reshard()
