"""Digests of gradients that do not depend on how the model is cut.

Every sum here is over the elements of a whole gradient, in any order, with a weight that is a hash
of the element's index. So each rank adds up what it holds, and one sum over the ranks ends it.
"""

from collections.abc import Iterable, Mapping, Sequence

import torch
import torch.distributed as dist
from torch import Tensor, nn
from torch.distributed.tensor import DTensor

from torchtitan.distributed.context import DistributedContext
from torchtitan.parallel.digest import Digest
from torchtitan.parallel.initialize import hash_values, indexed_chunks

_INTEGERS = {2: torch.int16, 4: torch.int32, 8: torch.int64}
"""By size: the type as which the bits of an element are read."""
_NUM_SIGNS = 2


class GradientDigests:
    """Digests of all gradients of a model; all ranks construct it and call `take`."""

    def __init__(
        self,
        world: DistributedContext,
        named: Iterable[tuple[str, nn.Parameter]],
        names: Sequence[str],
    ):
        """`named`: this rank's parameters; `names`: those of the whole model.

        Of several ranks with the same part of a parameter the first one counts it.
        """
        self._world, self._names = world, list(names)
        held: dict[str, nn.Parameter] = {}
        for name, parameter in named:  # a rank of a pipeline may hold both copies of a tied one
            held.setdefault(name, parameter)
        parts = {name: _part_of(parameter) for name, parameter in held.items()}
        earlier = world.gather_json(parts)[: world.rank]
        self._counted = {
            name: parameter
            for name, parameter in held.items()
            if all(other.get(name) != parts[name] for other in earlier)
        }

    @torch.no_grad()
    def take(self) -> Mapping[str, Digest]:
        """Return the digests by name, of the parameters that have a gradient."""
        integers = torch.zeros(len(self._names), 2, dtype=torch.int64)
        sums = torch.zeros(len(self._names), 1 + _NUM_SIGNS, dtype=torch.float64)
        for row, name in enumerate(self._names):
            gradient = self._counted[name].grad if name in self._counted else None
            if gradient is not None:
                bits, of_part = _sums(gradient, name)
                integers[row, 0], integers[row, 1], sums[row] = bits, 1, of_part
        for values in (integers, sums):
            dist.all_reduce(values, group=self._world.control_group)
        rows = zip(self._names, integers.tolist(), sums.tolist(), strict=True)
        return {
            name: Digest(bits % 2**64, square**0.5, tuple(projections))
            for name, (bits, parts), (square, *projections) in rows
            if parts
        }


def _part_of(parameter: nn.Parameter) -> list[int]:
    """Return what tells this rank's part of a parameter from the parts of other ranks."""
    if not isinstance(parameter, DTensor):
        return []
    place = parameter.device_mesh.get_coordinate()
    assert place is not None, "a rank outside of the mesh holds no part"
    return [
        at for at, way in zip(place, parameter.placements, strict=True) if not way.is_replicate()
    ]


def _sums(gradient: Tensor, name: str) -> tuple[Tensor, Tensor]:
    """Return the sums over this rank's part: of bits, and of squares and signed elements."""
    device = gradient.device
    bits = torch.zeros((), dtype=torch.int64, device=device)
    sums = torch.zeros(1 + _NUM_SIGNS, dtype=torch.float64, device=device)
    integer = _INTEGERS[gradient.element_size()]
    for chunk, indices in indexed_chunks(gradient):
        hashed = hash_values(indices, 0, name)
        read = chunk.contiguous().view(integer).view(indices.shape).long()
        if integer is torch.int64:  # an odd number leaves the topmost bits where they are
            read = read ^ (read >> 32 & 0xFFFFFFFF)
        bits += (read * (hashed | 1)).sum()
        values = chunk.double().reshape(indices.shape)
        sums[0] += values.square().sum()
        for number in range(_NUM_SIGNS):
            is_negative = (hashed >> (62 - number)) & 1 == 1
            sums[1 + number] += torch.where(is_negative, -values, values).sum()
    return bits, sums
