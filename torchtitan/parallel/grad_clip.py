"""The global gradient norm, on any mixture of meshes, and clipping by it.

Every rank adds up the squares of what it holds. A shard that several ranks hold alike is divided by
their number, so that one sum over all ranks counts each element once: one small collective,
whatever the number of parameters and meshes.
"""

import math
from collections.abc import Collection, Iterable, Mapping, Sequence

import torch
import torch.distributed as dist
from torch import Tensor, nn
from torch.distributed.tensor import DTensor, Replicate

from torchtitan.utils.dtypes import at_least_float32
from torchtitan.utils.torch_compat import local_tensor


@torch.no_grad()
def gradient_norm(
    parameters: Iterable[nn.Parameter],
    ranks_per_stage: int,
    uncounted: Collection[nn.Parameter] = (),
) -> Tensor:
    """Return the 2-norm of all gradients of the model, the same on all ranks.

    It is a scalar of at least float32.

    `ranks_per_stage` is the number of ranks that hold (parts or copies of) the same parameters;
    `uncounted` are copies of tied weights, which another stage counts. All ranks must call it.
    """
    left_out = set(uncounted)
    by_copies: dict[int, list[Tensor]] = {}
    device, dtype = None, torch.float32
    for parameter in parameters:
        device, dtype = parameter.device, at_least_float32(parameter.dtype)
        if parameter.grad is not None and parameter not in left_out:
            copies, gradient = _held(parameter.grad, ranks_per_stage)
            by_copies.setdefault(copies, []).append(gradient)
    norms = {copies: _norms(gradients) for copies, gradients in by_copies.items()}
    return _over_ranks(norms, device, dtype)


class StreamingGradNorm:
    """`gradient_norm`, bit for bit, of gradients that do not all exist at the same time."""

    def __init__(self, ranks_per_stage: int, device: torch.device, dtype: torch.dtype):
        """`device` and `dtype` are those of the gradients."""
        self._ranks_per_stage = ranks_per_stage
        self._device = device
        self._dtype = at_least_float32(dtype)
        self._norms: dict[int, tuple[int, Tensor]] = {}

    @torch.no_grad()
    def add(self, index: int, gradient: Tensor) -> None:
        """Count the gradient of the parameter of this index, once."""
        assert index not in self._norms, "a parameter has two gradients in one step"
        copies, gradient = _held(gradient, self._ranks_per_stage)
        self._norms[index] = copies, _norms([gradient])[0]

    @torch.no_grad()
    def take(self) -> Tensor:
        """The norm of what was added; starts anew. All ranks must call it."""
        by_copies: dict[int, list[Tensor]] = {}
        for _, (copies, norm) in sorted(self._norms.items(), key=lambda item: item[0]):
            by_copies.setdefault(copies, []).append(norm)
        self._norms.clear()
        return _over_ranks(by_copies, self._device, self._dtype)


def _held(gradient: Tensor, ranks_per_stage: int) -> tuple[int, Tensor]:
    """Return the number of ranks that hold the same part of the gradient, and that part."""
    if not isinstance(gradient, DTensor):
        return ranks_per_stage, gradient
    mesh = gradient.device_mesh
    num_shards = math.prod(
        mesh.size(axis)
        for axis, placement in enumerate(gradient.placements)
        if not isinstance(placement, Replicate)
    )
    return ranks_per_stage // num_shards, gradient.to_local()


def _norms(gradients: list[Tensor]) -> Sequence[Tensor]:
    return torch._foreach_norm(gradients, 2, dtype=at_least_float32(gradients[0].dtype))


def _over_ranks(
    norms: Mapping[int, Sequence[Tensor]], device: torch.device | None, dtype: torch.dtype
) -> Tensor:
    """Return the norm over all ranks; `norms` are of parts, by the number of ranks with each.

    A rank whose parameters are all frozen has none, and must pass the `dtype` of the other ranks.
    """
    total = torch.zeros((), dtype=dtype, device=device)
    for copies, parts in norms.items():
        total = total + torch.stack(tuple(parts)).square().sum() / copies
    dist.all_reduce(total)
    return total.sqrt()


@torch.no_grad()
def clip_gradients(parameters: Iterable[nn.Parameter], norm: Tensor, max_norm: float) -> None:
    """Scale all gradients by max_norm / norm if the norm is larger, without a device sync."""
    if math.isinf(max_norm):
        return
    factor = (max_norm / (norm + 1e-6)).clamp(max=1.0)
    gradients = []
    for parameter in parameters:
        if parameter.grad is not None:
            gradients.append(local_tensor(parameter.grad))
    if gradients:
        torch._foreach_mul_(gradients, factor.to(gradients[0].dtype))
