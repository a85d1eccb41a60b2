"""An embedding whose gradient is summed in float32 or wider.

A row's gradient is a sum over all places where its token occurs, thousands for the commonest one.
PyTorch's kernel for CPUs adds them up in the type of the weight: in bfloat16 a sum of equal terms
stops growing after 256 of them. So it would depend on how many tokens a microbatch has, which is to
say, on the mesh. The price is a gradient `[V, D]` in float32 for as long as it takes to round it.
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
        """int64 `[B, T]` -> `[B, T, D]`."""
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
