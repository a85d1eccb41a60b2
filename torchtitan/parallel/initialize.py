"""Initial weights that do not depend on how the model is cut.

Every element is a function of (seed, parameter name, index of the element in the whole parameter):
a 64-bit hash of these is mapped to a normal distribution by its inverse. So each rank fills what it
holds, whatever that is, without communication and without building whole parameters, and every mesh
starts from the same bits (per type of device: another may round the inverse differently).

The price is some 3 seconds per 100 million elements and core, against 0.4 for a random generator,
whose values however depend on the order and the shape in which they are drawn.
"""

import hashlib
import math
from collections.abc import Callable, Iterable, Iterator

import torch
from torch import Tensor, nn
from torch.distributed.tensor import DTensor, Replicate, Shard
from torch.distributed.tensor.placement_types import _StridedShard

from torchtitan.models.spec import InitRule
from torchtitan.utils.torch_compat import local_tensor

_CHUNK = 1 << 17
"""Elements computed at once: 1 MiB per temporary, which stays in the cache."""


def initialize_parameters(model: nn.Module, rule: Callable[[str], InitRule], seed: int) -> None:
    """Fill every parameter of `model` in place by `rule(name)`, see `initialize_tensors`.

    A parameter with several names (tied weights) is filled by its first.
    """
    initialize_tensors(model.named_parameters(), rule, seed)


@torch.no_grad()
def initialize_tensors(
    named: Iterable[tuple[str, Tensor]], rule: Callable[[str], InitRule], seed: int
) -> None:
    """Fill tensors in place by `rule(name)`, without communication.

    They may be plain tensors or DTensors with any sharding, empty shards too. Raises ValueError for
    one on the meta device, and for one of integers that is to be normal.
    """
    for name, tensor in named:
        if tensor.is_meta:
            raise ValueError(f"{name} is on the meta device: allocate it before it is initialised")
        local = local_tensor(tensor)
        init = rule(name)
        if init.kind == "constant":
            local.fill_(init.value)
            continue
        if not (local.is_floating_point() or local.is_complex()):  # normal values would be cut off
            raise ValueError(f"{name} is {local.dtype}: it can only start with a constant")
        _fill_normal(tensor, init, _key(seed, name))


def indexed_chunks(tensor: Tensor) -> Iterator[tuple[Tensor, Tensor]]:
    """Yield what this rank holds of `tensor` in pieces, and the indices of their elements.

    The pieces are views of consecutive rows; the indices are those in the whole tensor, as int64
    `[rows, elements of a row]`.
    """
    local = local_tensor(tensor)
    if not local.dim():  # a buffer; a scalar parameter could not be sharded
        local = tensor = local.unsqueeze(0)
    if not local.numel():
        return
    rows, columns = _linear_indices(tensor.shape, local_indices(tensor))
    at_once = max(1, _CHUNK // len(columns))
    for start in range(0, len(rows), at_once):
        chosen = slice(start, start + at_once)
        yield local[chosen], rows[chosen].unsqueeze(1) + columns


def hashed_bits(tensor: Tensor, label: str) -> Tensor:
    """Return 64 random bits (int64) for each element that this rank holds of `tensor`.

    They are a function of the label and the element's index in the whole tensor.
    """
    local = local_tensor(tensor)
    rows, columns = _linear_indices(tensor.shape, local_indices(tensor))
    return _hash(rows.unsqueeze(1) + columns, _key(0, label)).view(local.shape)


def hash_values(values: Tensor, seed: int, label: str) -> Tensor:
    """Return 64 random bits (int64) for each int64 value, a function of it, seed and label."""
    return _hash(values.clone(), _key(seed, label))


def local_indices(tensor: Tensor) -> list[Tensor]:
    """Return, for each dimension, the indices of the elements that this rank holds.

    The placements are applied one after the other, from left to right over the mesh, to the indices
    of their dimension; this also covers `_StridedShard`, whose parts need not be contiguous.
    """
    indices = [torch.arange(size, device=tensor.device) for size in tensor.shape]
    if not isinstance(tensor, DTensor):
        return indices
    mesh = tensor.device_mesh
    coordinate = mesh.get_coordinate()
    assert coordinate is not None, "a rank outside of the mesh holds no part"
    for axis, placement in enumerate(tensor.placements):
        if isinstance(placement, (Shard, _StridedShard)):
            # The split is along the placement's own dimension: give the indices that many.
            column = indices[placement.dim].view((1,) * placement.dim + (-1,))
            parts, _ = placement._split_tensor(
                column, mesh.size(axis), with_padding=False, contiguous=False
            )
            indices[placement.dim] = parts[coordinate[axis]].reshape(-1)
        elif not isinstance(placement, Replicate):
            raise ValueError(f"a parameter with placement {placement} cannot be initialised")
    assert [len(held) for held in indices] == list(tensor.to_local().shape)
    return indices


@torch.no_grad()
def fill_part(tensor: Tensor, whole: Tensor) -> None:
    """Copy to `tensor` the elements that this rank holds of it from a tensor of its whole shape."""
    held = torch.meshgrid(
        *(index.to(whole.device) for index in local_indices(tensor)), indexing="ij"
    )
    local_tensor(tensor).copy_(whole[held])


def _linear_indices(shape: torch.Size, held: list[Tensor]) -> tuple[Tensor, Tensor]:
    """Rows and columns whose sums are the held elements' indices in the whole tensor, row by row.

    Rows run over the first dimension, columns over the others together.
    """
    rows = held[0] * math.prod(shape[1:])
    columns = torch.zeros(1, dtype=torch.int64, device=rows.device)
    for axis, indices in enumerate(held[1:], start=1):
        step = indices * math.prod(shape[axis + 1 :])
        columns = (columns.unsqueeze(-1) + step).reshape(-1)
    return rows, columns


def _fill_normal(tensor: Tensor, init: InitRule, key: int) -> None:
    for chunk, indices in indexed_chunks(tensor):
        # Rounds to the parameter's type.
        chunk.copy_(_normal(indices, init, key).view(chunk.shape))


def _normal(indices: Tensor, init: InitRule, key: int) -> Tensor:
    """Normal values (float64) of the elements of these indices; overwrites `indices`."""
    bits = _hash(indices, key)
    # An odd number of 54 bits times 2^-53: uniform and symmetric in (-1, 1), exact, never 0 or 1.
    uniform = ((bits >> 10) | 1).double().mul_(2.0**-53)
    if init.cutoff_in_std is not None:
        uniform.mul_(math.erf(init.cutoff_in_std / math.sqrt(2)))
    return torch.erfinv(uniform).mul_(init.std * math.sqrt(2))


def _hash(values: Tensor, key: int) -> Tensor:
    """SplitMix64 (https://doi.org/10.1145/2660193.2660195) from state `key`, at steps `values`.

    In place, int64; products wrap, and shifts, which are signed, are masked.
    """
    values.mul_(_signed(0x9E3779B97F4A7C15)).add_(key)
    values.bitwise_xor_((values >> 30) & ((1 << 34) - 1)).mul_(_signed(0xBF58476D1CE4E5B9))
    values.bitwise_xor_((values >> 27) & ((1 << 37) - 1)).mul_(_signed(0x94D049BB133111EB))
    return values.bitwise_xor_((values >> 31) & ((1 << 33) - 1))


def _key(seed: int, name: str) -> int:
    digest = hashlib.sha256(f"{seed}/{name}".encode()).digest()
    return int.from_bytes(digest[:8], "little", signed=True)


def _signed(value: int) -> int:
    return value - (1 << 64) if value >= 1 << 63 else value
