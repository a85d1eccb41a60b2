"""The handler `bitnet`: weights of -1, 0 and 1 with a scale, inputs of 8 bits (BitNet b1.58,
https://arxiv.org/abs/2402.17764).

The weights that are trained have full precision; each forward rounds them by the mean of their
magnitudes, and the gradient passes through the rounding. torchao does the arithmetic (a prototype
there). Its own weights are tensors of a class that FSDP exchanges in 2 bits, with a scale averaged
over all ranks of the job, whatever they hold; here FSDP gathers usual weights, and the scale is
that of the whole matrix on every mesh.
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


class _TernaryProduct(torch.autograd.Function):
    @staticmethod
    def forward(ctx: Any, x: Tensor, weight: Tensor) -> Tensor:
        flat, row_scale = quantize_int8_rowwise(x.reshape(-1, x.size(-1)), eps=1e-5)
        mean = get_bitnet_scale(weight)
        ternary = quantize_bitnet_weight(weight, mean)
        scale = mean.to(weight.dtype)
        ctx.save_for_backward(flat, row_scale, ternary, scale)
        out = scaled_int8_mm(flat.contiguous(), ternary.contiguous().T, row_scale, scale)
        return out.to(x.dtype).unflatten(0, x.shape[:-1])

    @staticmethod
    def backward(ctx: Any, grad: Tensor) -> tuple[Tensor, Tensor]:
        flat, row_scale, ternary, scale = ctx.saved_tensors
        rows = grad.reshape(-1, grad.size(-1))
        grad_input = (rows @ ternary.to(grad.dtype)) * scale
        rounded_input = flat * row_scale.view(-1, 1)
        return grad_input.unflatten(0, grad.shape[:-1]), rows.T @ rounded_input


class BitNetLinear(nn.Linear):
    """A linear without bias, whose weight is rounded to three values."""

    def forward(self, input: Tensor) -> Tensor:
        """`[..., inputs]` to `[..., outputs]`."""
        out = _TernaryProduct.apply(input, self.weight)
        return out if self.bias is None else out + self.bias


class BitNetHandler(LinearHandler):
    """Swaps linears for `BitNetLinear`."""

    name = "bitnet"
    multiple = 16

    def swap(self, name: str, linear: nn.Linear) -> nn.Linear:
        """The same module with another class."""
        linear.__class__ = BitNetLinear
        return linear
