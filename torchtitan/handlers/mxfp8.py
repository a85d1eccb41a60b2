"""The handler `mxfp8`: float8 linears where 32 numbers share a scale, a power of two.

The OCP's microscaling format, which Blackwell GPUs multiply. torchao does the arithmetic (a
prototype there).
"""

from torch import Tensor, float8_e4m3fn, nn
from torchao.prototype.moe_training.mxfp8_linear import mx_mm
from torchao.prototype.mx_formats.config import (
    MXFP8Dim0CastKernelChoice,
    MXFP8Dim1CastKernelChoice,
    ScaleCalculationMode,
)
from torchao.quantization.quantize_.common import KernelPreference

from torchtitan.handlers.linears import LinearHandler
from torchtitan.handlers.settings import EMULATED, MXFP8_BLOCK


class Mxfp8Linear(nn.Linear):
    """A linear that computes its three products in MXFP8."""

    emulated: bool
    kernel: str

    def forward(self, input: Tensor) -> Tensor:
        """Map `[..., inputs]` to `[..., outputs]`."""
        across, along = MXFP8Dim0CastKernelChoice.TRITON, MXFP8Dim1CastKernelChoice(self.kernel)
        if self.emulated:
            across, along = MXFP8Dim0CastKernelChoice.TORCH, MXFP8Dim1CastKernelChoice.TORCH
        out = mx_mm.apply(
            input.contiguous(),
            self.weight,
            float8_e4m3fn,
            float8_e4m3fn,
            float8_e4m3fn,
            MXFP8_BLOCK,
            KernelPreference.EMULATED if self.emulated else KernelPreference.AUTO,
            across,
            along,
            ScaleCalculationMode.RCEIL,
            False,
        )
        return out if self.bias is None else out + self.bias


class Mxfp8Handler(LinearHandler):
    """Swaps linears for `Mxfp8Linear`."""

    name = "mxfp8"
    multiple = MXFP8_BLOCK

    def swap(self, name: str, linear: nn.Linear) -> nn.Linear:
        """Return the same module with another class."""
        linear.__class__ = Mxfp8Linear
        linear.emulated = self.settings.recipe_name == EMULATED  # type: ignore[assignment]
        linear.kernel = self.settings.mxfp8_dim1_cast_kernel_choice  # type: ignore[assignment]
        return linear
