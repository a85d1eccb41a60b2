"""An embedding whose gradient is summed in float32 or wider.

A row's gradient is a sum over all occurrences of its token, thousands for the most frequent one.
PyTorch's CPU kernel adds them in the weight's type, and in bfloat16 a sum of equal terms stops
growing after 256 of them, so the result would depend on the tokens per microbatch, that is, on the
mesh. The price is a temporary float32 gradient `[V, D]`.
"""

from typing import Any

import torch
import torch.nn.functional as F
from torch import Tensor, nn
from torch.autograd.function import once_differentiable

from torchtitan.utils.dtypes import at_least_float32


class Embedding(nn.Embedding):
    """`nn.Embedding`, without its options."""

    def forward(self, tokens: Tensor) -> Tensor:
        """Look up int64 tokens `[B, T]`: `[B, T, D]`."""
        if self.weight.dtype == at_least_float32(self.weight.dtype):
            return super().forward(tokens)
        return _WideGradient.apply(self.weight, tokens)


class _WideGradient(torch.autograd.Function):
    @staticmethod
    def forward(ctx: Any, weight: Tensor, tokens: Tensor) -> Tensor:
        ctx.save_for_backward(tokens)
        ctx.num_rows, ctx.weight_dtype = weight.size(0), weight.dtype
        return F.embedding(tokens, weight)

    @staticmethod
    @once_differentiable
    def backward(ctx: Any, grad: Tensor) -> tuple[Tensor, None]:
        (tokens,) = ctx.saved_tensors
        wide = grad.to(at_least_float32(grad.dtype))
        # What PyTorch's own backward calls. No row is left out, none divided by its count.
        total = torch.ops.aten.embedding_dense_backward(wide, tokens, ctx.num_rows, -1, False)
        return total.to(ctx.weight_dtype), None
