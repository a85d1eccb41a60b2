"""Read a file of `torch.save` that holds a model's tensors by our names, which are Meta's."""

from collections.abc import Mapping
from pathlib import Path
from typing import Any

import torch
from torch import Tensor

from torchtitan.weights.meta_source import load_tensors


class TorchFile:
    """The tensors of a file, mapped, without running code. Raises `InvalidWeights`."""

    def __init__(self, file: Path):
        self._mapped = load_tensors(file)
        self.tensors: Mapping[str, dict[str, Any]] = {
            name: {"dtype": str(tensor.dtype).removeprefix("torch."), "shape": list(tensor.shape)}
            for name, tensor in self._mapped.items()
        }
        """Type and shape by name, as in `Manifest.tensors`."""

    @torch.no_grad()
    def load(self, tensors: Mapping[str, Tensor]) -> None:
        """Fill whole tensors in place, converting types that differ."""
        for name, tensor in tensors.items():
            tensor.copy_(self._mapped[name])
