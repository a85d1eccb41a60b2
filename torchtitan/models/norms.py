"""Norms over the last dimension (`model.norm_type`), computed in at least float32, without a bias.

Root mean square normalisation (https://arxiv.org/abs/1910.07467) is one PyTorch kernel on CUDA and
in compiled code. On a CPU, uncompiled, PyTorch runs a dozen, several of which save tensors for the
backward. The version here takes a third less time there and saves only the input, which the
residual stream keeps anyway, and one number per position.
"""

from typing import Any

import torch
import torch.nn.functional as F
from torch import Tensor, nn
from torch.autograd.function import once_differentiable

from torchtitan.config.schema import NormType
from torchtitan.utils.dtypes import at_least_float32


def rms_norm(x: Tensor, weight: Tensor, eps: float) -> Tensor:
    """Return x / sqrt(mean(x^2) + eps) * weight over the last dimension.

    `x` is `[..., D]` of any type, `weight` `[D]`; the result is of `x`'s type, rounded once.
    """
    if x.device.type == "cpu" and not torch.compiler.is_compiling():
        return _RMSNorm.apply(x, weight, eps)
    return F.rms_norm(x, weight.shape, weight, eps)


class _RMSNorm(torch.autograd.Function):
    @staticmethod
    def forward(ctx: Any, x: Tensor, weight: Tensor, eps: float) -> Tensor:
        wide = x.to(at_least_float32(x.dtype), copy=True)
        norm = torch.linalg.vector_norm(wide, dim=-1, keepdim=True)
        scale = norm.square_().div_(x.size(-1)).add_(eps).rsqrt_()  # [..., 1]
        ctx.save_for_backward(x, weight, scale)
        return wide.mul_(scale).mul_(weight).to(x.dtype)

    @staticmethod
    @once_differentiable
    def backward(ctx: Any, grad: Tensor) -> tuple[Tensor, Tensor, None]:
        """With n = x * scale and g = grad * weight: (g - n * mean(g * n)) * scale."""
        x, weight, scale = ctx.saved_tensors
        dim = x.size(-1)
        normed = x.to(scale.dtype, copy=True).mul_(scale).reshape(-1, dim)
        wide_grad, wide_weight = grad.to(scale.dtype).reshape(-1, dim), weight.to(scale.dtype)
        products = wide_grad * normed
        # Sums over rows and over columns as matrix products, which are faster than reductions.
        grad_weight = products.t() @ products.new_ones(len(products))
        means = (products @ wide_weight).div_(dim).unsqueeze(1)
        grad_x = normed.mul_(means.neg_()).addcmul_(wide_grad, wide_weight).view(x.shape)
        return grad_x.mul_(scale).to(x.dtype), grad_weight.to(weight.dtype), None


class RMSNorm(nn.Module):
    """`rms_norm` as a module."""

    def __init__(self, dim: int, eps: float):
        super().__init__()
        self.eps = eps
        self.weight = nn.Parameter(torch.ones(dim))

    def forward(self, x: Tensor) -> Tensor:
        """Normalise `x` `[..., D]`."""
        return rms_norm(x, self.weight, self.eps)


def build_norm(kind: NormType, dim: int, eps: float) -> nn.Module:
    """Return a norm of `[..., dim]`. Its parameter, if any, is called `weight` and starts at 1."""
    if kind == "rmsnorm":
        return RMSNorm(dim, eps)
    if kind == "fused_rmsnorm":
        return nn.RMSNorm(dim, eps)
    # Subtracts the mean before it divides by the deviation: https://arxiv.org/abs/1607.06450
    return nn.LayerNorm(dim, eps, elementwise_affine=kind == "layernorm", bias=False)
