"""The handler `bitnet`: weights of -1, 0 and 1 with a scale, inputs of 8 bits.

BitNet b1.58, https://arxiv.org/abs/2402.17764.
The trained weights have full precision; each forward rounds them by the mean of their magnitudes,
and the gradient passes through the rounding. torchao does the arithmetic (a prototype there). Its
own weight class lets FSDP exchange 2 bits, but averages the scale over all ranks of the job,
whatever they hold. Here FSDP gathers plain weights, and tensor-parallel ranks average the scale
over the shards of a matrix, so it is that of the whole matrix on every mesh.
"""

from typing import Any

import torch
from torch import Tensor, nn
from torchao.prototype.quantized_training import quantize_int8_rowwise
from torchao.prototype.quantized_training.bitnet import (
    get_bitnet_scale,
    quantize_bitnet_weight,
    scaled_int8_mm,
)

from torchtitan.handlers.linears import LinearHandler
from torchtitan.parallel.tensor_parallel import TensorGroup

_C10D = torch.ops._c10d_functional


class _TernaryProduct(torch.autograd.Function):
    @staticmethod
    def forward(ctx: Any, x: Tensor, weight: Tensor, name: str, size: int) -> Tensor:
        flat, row_scale = quantize_int8_rowwise(x.reshape(-1, x.size(-1)), eps=1e-5)
        mean = get_bitnet_scale(weight)
        if size > 1:
            # Shards have equal sizes, so the mean of their means is the mean of the matrix.
            mean = _C10D.wait_tensor(_C10D.all_reduce(mean, "sum", name)) / size
        ternary = quantize_bitnet_weight(weight, mean)
        scale = mean.to(weight.dtype)
        ctx.save_for_backward(flat, row_scale, ternary, scale)
        out = scaled_int8_mm(flat.contiguous(), ternary.contiguous().T, row_scale, scale)
        return out.to(x.dtype).unflatten(0, x.shape[:-1])

    @staticmethod
    def backward(ctx: Any, grad: Tensor) -> tuple[Tensor, Tensor, None, None]:
        flat, row_scale, ternary, scale = ctx.saved_tensors
        rows = grad.reshape(-1, grad.size(-1))
        grad_input = (rows @ ternary.to(grad.dtype)) * scale
        rounded_input = flat * row_scale.view(-1, 1)
        return grad_input.unflatten(0, grad.shape[:-1]), rows.T @ rounded_input, None, None


class BitNetLinear(nn.Linear):
    """A linear whose weight is rounded to three values."""

    group: TensorGroup | None = None
    """The ranks that hold the shards of the weight, with tensor parallelism."""

    def forward(self, input: Tensor) -> Tensor:
        """Map `[..., inputs]` to `[..., outputs]`."""
        name, size = ("", 1) if self.group is None else (self.group.name, self.group.size)
        out = _TernaryProduct.apply(input, self.weight, name, size)
        return out if self.bias is None else out + self.bias


class BitNetHandler(LinearHandler):
    """Swaps linears for `BitNetLinear`."""

    name = "bitnet"
    multiple = 16

    def swap(self, name: str, linear: nn.Linear) -> nn.Linear:
        """Return the same module with another class."""
        linear.__class__ = BitNetLinear
        return linear
