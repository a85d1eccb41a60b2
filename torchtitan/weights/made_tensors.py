"""Tensors of a model that are made of a stored one of another shape: quantised, for example."""

from collections.abc import Callable, Sequence
from dataclasses import dataclass

import torch
from torch import Tensor
from torch.distributed.tensor import DTensor

from torchtitan.utils.dtypes import at_least_float32
from torchtitan.utils.torch_compat import local_tensor


@dataclass(frozen=True)
class MadeTensors:
    """Tensors that `store` fills from a matrix `[rows, columns]`, part by part."""

    names: tuple[str, ...]
    like: Tensor
    """One of them, a plain tensor or a DTensor: the matrix is cut like it."""
    columns: int
    """Columns of the matrix for each of `like`."""
    store: Callable[[Tensor], None]
    """Fills this rank's parts from its part of the matrix, which has the form of `allocate`."""
    restore: Callable[[Sequence[Tensor], torch.dtype], Tensor]
    """Returns the matrix that whole tensors of `names` stand for; `store` makes the same of it."""

    @property
    def shape(self) -> torch.Size:
        """The shape of the whole matrix."""
        return torch.Size((self.like.size(0), self.like.size(1) * self.columns))

    def allocate(self, at_least: torch.dtype = torch.float32) -> Tensor:
        """Return memory for this rank's part of the matrix, on the device of `like`."""
        part, dtype = local_tensor(self.like), at_least_float32(at_least)
        local = torch.empty(
            part.size(0), part.size(1) * self.columns, dtype=dtype, device=part.device
        )
        if not isinstance(self.like, DTensor):
            return local
        mesh, placements, stride = self.like.device_mesh, self.like.placements, (self.shape[1], 1)
        return DTensor.from_local(
            local, mesh, placements, run_check=False, shape=self.shape, stride=stride
        )
