"""Find tensors that hold NaN or infinity, and agree about them over all ranks.

A pass over memory without copies: the smallest and the largest element of each tensor, which are
NaN if any element is. Only whether all of them are finite comes back to the host, at once. How long
that takes, compared with saving the same tensors, is measured by `scripts/bench_finiteness.py`.
"""

from collections import defaultdict
from collections.abc import Container, Mapping

import torch
import torch.distributed as dist
from torch import Tensor

from torchtitan.distributed.context import DistributedContext
from torchtitan.utils.torch_compat import local_tensor

_NATIVE = (torch.float16, torch.bfloat16, torch.float32, torch.float64)


def non_finite(tensors: Mapping[str, Tensor], may_be_infinite: Container[str] = ()) -> list[str]:
    """Return the names of tensors that hold NaN or infinity in the part that this rank has.

    Those in `may_be_infinite` are named for NaN only. Waits for the device.
    """
    extremes: dict[tuple[torch.device, torch.dtype], dict[str, list[Tensor]]] = defaultdict(dict)
    for name, tensor in tensors.items():
        local = local_tensor(tensor.detach())
        if local.is_complex():
            local = torch.view_as_real(local)
        if not local.is_floating_point() or not local.numel():
            continue
        if local.dtype not in _NATIVE:  # float8
            local = local.float()
        extremes[local.device, local.dtype][name] = list(local.aminmax())
    found = set()
    for group in extremes.values():
        pairs = torch.stack([value for pair in group.values() for value in pair]).view(-1, 2)
        # Two flags for each tensor, in one transfer.
        flags = torch.stack([pairs.isfinite().all(1), ~pairs.isnan().any(1)], 1).tolist()
        for name, (is_finite, is_number) in zip(group, flags, strict=True):
            if not (is_number if name in may_be_infinite else is_finite):
                found.add(name)
    return [name for name in tensors if name in found]


def non_finite_on_any_rank(
    world: DistributedContext, tensors: Mapping[str, Tensor], may_be_infinite: Container[str] = ()
) -> list[str]:
    """Return the names that `non_finite` finds on any rank, the same list on all of them.

    All ranks must call it. One all-reduce of an integer where everything is finite.
    """
    mine = non_finite(tensors, may_be_infinite)
    number = torch.tensor([len(mine)])
    dist.all_reduce(number, group=world.control_group)
    if not number.item():
        return []
    return list(dict.fromkeys(name for names in world.gather_json(mine) for name in names))
