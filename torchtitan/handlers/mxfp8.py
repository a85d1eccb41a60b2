"""The handler `mxfp8`: linears in float8 whose scales, powers of two, are shared by 32 numbers.

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
from torchtitan.handlers.mxfp8_settings import BLOCK, EMULATED


class Mxfp8Linear(nn.Linear):
    """A linear whose three products are of MXFP8."""

    emulated: bool
    kernel: str

    def forward(self, input: Tensor) -> Tensor:
        """`[..., inputs]` to `[..., outputs]`."""
        across, along = MXFP8Dim0CastKernelChoice.TRITON, MXFP8Dim1CastKernelChoice(self.kernel)
        if self.emulated:
            across, along = MXFP8Dim0CastKernelChoice.TORCH, MXFP8Dim1CastKernelChoice.TORCH
        out = mx_mm.apply(
            input.contiguous(),
            self.weight,
            float8_e4m3fn,
            float8_e4m3fn,
            float8_e4m3fn,
            BLOCK,
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
    multiple = BLOCK

    def swap(self, name: str, linear: nn.Linear) -> nn.Linear:
        """The same module with another class."""
        linear.__class__ = Mxfp8Linear
        linear.emulated = self.settings.recipe_name == EMULATED  # type: ignore[assignment]
        linear.kernel = self.settings.mxfp8_dim1_cast_kernel_choice  # type: ignore[assignment]
        return linear
