"""Dropout whose mask is a function of (seed, step, module, token, channel), and of nothing else.

Torch's generators draw a mask in the order and the shape of a rank's tensors. Here an element is
dropped by a hash, so that any cut of the batch, the sequence or the channels drops the same ones.
A token is a row of the step and an index in it; `RandomStreams` hashes these once a microbatch.
"""

import torch
from torch import Tensor, nn

from torchtitan.parallel.initialize import hash_values

_SHIFT, _KEPT_BITS = 15, (1 << 17) - 1
_FIRST, _SECOND = 0x2C1B3C6D, 0x297A2D39
"""Odd multipliers of a 32-bit mixing function (https://github.com/skeeto/hash-prospector)."""


class TokenDropout(nn.Module):
    """Zero elements of `[B, T, channels]` with probability `p`, without scaling the others.

    A rank may have some of the rows, tokens or channels; `rows` and `columns` are set from outside.
    """

    def __init__(self, p: float, channels: int):
        super().__init__()
        self.p = p
        self.channels = channels
        self.rows: Tensor | None = None
        """Hashes of this rank's tokens, int32 `[B, T]`, in every training forward."""
        self.columns: Tensor | None = None
        """Hashes of all channels, int32 `[channels]`."""
        self.tensor_rank = 0
        """The rank's place among those that have a part of the channels each."""

    def name_channels(self, seed: int, name: str, tensor_rank: int, device: torch.device) -> None:
        """Hash the channels of the module of this full `name`."""
        numbers = torch.arange(self.channels, device=device)
        self.columns = low_bits(hash_values(numbers, seed, f"{name}/channels"))
        self.tensor_rank = tensor_rank

    def forward(self, x: Tensor) -> Tensor:
        """Drop elements of `x` while training."""
        if not self.training or self.p == 0:
            return x
        assert self.rows is not None and self.columns is not None, "the model has no RandomStreams"
        columns, held = self.columns, x.size(-1)
        if held < self.channels:
            columns = columns.narrow(0, self.tensor_rank * held, held)
        mixed = (self.rows.unsqueeze(-1) ^ columns) * _FIRST
        mixed = (mixed ^ ((mixed >> _SHIFT) & _KEPT_BITS)) * _SECOND
        bound = min(round(self.p * 2**32), 2**32 - 1) - 2**31  # a larger one would wrap around
        return x.masked_fill(mixed < bound, 0.0)

    def extra_repr(self) -> str:
        """Show the probability."""
        return f"p={self.p}"


def low_bits(hashes: Tensor) -> Tensor:
    """Return 32 of the 64 random bits of each int64 element, as int32."""
    return (hashes >> 32).to(torch.int32)


def token_dropouts(module: nn.Module) -> list[TokenDropout]:
    """Return those inside `module` that drop anything."""
    return [m for m in module.modules() if isinstance(m, TokenDropout) and m.p > 0]
