"""The global gradient norm, on any mixture of meshes, and clipping by it.

Every rank adds up the squares of what it holds. A shard that several ranks hold alike is divided by
their number, so that one sum over all ranks counts each element once: one small collective,
whatever the number of parameters and meshes.
"""

import math
from collections.abc import Iterable

import torch
import torch.distributed as dist
from torch import Tensor, nn
from torch.distributed.tensor import DTensor, Replicate

from torchtitan.utils.dtypes import at_least_float32


@torch.no_grad()
def gradient_norm(parameters: Iterable[nn.Parameter], ranks_per_stage: int) -> Tensor:
    """2-norm of all gradients of the model, a scalar of at least float32, the same on all ranks.

    `ranks_per_stage` is the number of ranks that hold (parts or copies of) the same parameters. All
    ranks must call it.
    """
    by_copies: dict[int, list[Tensor]] = {}
    device = None
    for parameter in parameters:
        device = parameter.device
        gradient = parameter.grad
        if gradient is None:
            continue
        num_shards = 1
        if isinstance(gradient, DTensor):
            mesh = gradient.device_mesh
            num_shards = math.prod(
                mesh.size(axis)
                for axis, placement in enumerate(gradient.placements)
                if not isinstance(placement, Replicate)
            )
            gradient = gradient.to_local()
        by_copies.setdefault(ranks_per_stage // num_shards, []).append(gradient)
    total = torch.zeros((), dtype=torch.float32, device=device)
    for copies, gradients in by_copies.items():
        wide = at_least_float32(gradients[0].dtype)
        norms = torch.stack(torch._foreach_norm(gradients, 2, dtype=wide))
        total = total + norms.square().sum() / copies
    dist.all_reduce(total)
    return total.sqrt()


@torch.no_grad()
def clip_gradients(parameters: Iterable[nn.Parameter], norm: Tensor, max_norm: float) -> None:
    """Scale all gradients by max_norm / norm where the norm is larger. Does not wait for the
    device."""
    if math.isinf(max_norm):
        return
    factor = (max_norm / (norm + 1e-6)).clamp(max=1.0)
    gradients = []
    for parameter in parameters:
        gradient = parameter.grad
        if gradient is not None:
            gradients.append(gradient.to_local() if isinstance(gradient, DTensor) else gradient)
    if gradients:
        torch._foreach_mul_(gradients, factor.to(gradients[0].dtype))
