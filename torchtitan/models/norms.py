"""The norms that a model may choose between (`model.norm_type`), over the last dimension.

All work in at least float32 inside, and none has a bias.
"""

import torch
from torch import Tensor, nn

from torchtitan.config.schema import NormType
from torchtitan.models.rms_norm import rms_norm


class RMSNorm(nn.Module):
    """x / sqrt(mean(x^2) + eps) * weight, computed in at least float32."""

    def __init__(self, dim: int, eps: float):
        super().__init__()
        self.eps = eps
        self.weight = nn.Parameter(torch.ones(dim))

    def forward(self, x: Tensor) -> Tensor:  # [..., D]
        return rms_norm(x, self.weight, self.eps)


def build_norm(kind: NormType, dim: int, eps: float) -> nn.Module:
    """A norm of `[..., dim]`. Its parameter, if it has one, is called `weight`, and starts at 1."""
    if kind == "rmsnorm":
        return RMSNorm(dim, eps)
    if kind == "fused_rmsnorm":
        return nn.RMSNorm(dim, eps)
    # Subtracts the mean before it divides by the deviation: https://arxiv.org/abs/1607.06450
    return nn.LayerNorm(dim, eps, elementwise_affine=kind == "layernorm", bias=False)
