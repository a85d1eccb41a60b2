"""`Batch`: the named tensors that travel from the data to the model and the loss."""

from typing import Any

import torch

IGNORE_INDEX = -100
"""Label of a position without a target."""


class Batch(dict[str, torch.Tensor]):
    """Named tensors of one microbatch, the same object for every part of the model.

    `tokens`, `labels`, `positions` and `document_ids` are int64 `[B, T]`; `labels` is already
    shifted (the label of position t is the token at t + 1) and `IGNORE_INDEX` where nothing is
    predicted. Further tensors pass through untouched.
    """

    def to(self, device: torch.device, non_blocking: bool = False) -> "Batch":
        """Copy to `device`; asynchronously from page-locked memory if `non_blocking`."""
        return Batch(
            {name: tensor.to(device, non_blocking=non_blocking) for name, tensor in self.items()}
        )

    def pin_memory(self, *args: Any) -> "Batch":
        """Copy to page-locked host memory."""
        return Batch({name: tensor.pin_memory(*args) for name, tensor in self.items()})

    @property
    def num_tokens(self) -> int:
        """Positions in the batch, B * T."""
        return self["tokens"].numel()
