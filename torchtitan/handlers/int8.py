"""The handler `int8`: linears whose products are of 8-bit integers, weights staying as they are.

torchao's mixed-precision training (a prototype there): each row of one factor and each column of
the other is rounded to integers by its largest magnitude, and the sums are scaled back. The
parameters are the usual ones, so that only the linears' arithmetic is new to anyone.
"""

from torch import Tensor, nn
from torchao.prototype.quantized_training import (
    Int8MixedPrecisionTrainingConfig,
    Int8MixedPrecisionTrainingLinear,
)

from torchtitan.handlers.int8_settings import MULTIPLE
from torchtitan.handlers.linears import LinearHandler


class Int8Linear(Int8MixedPrecisionTrainingLinear):
    """torchao's, which views tensors as it likes and so needs them contiguous."""

    def forward(self, input: Tensor) -> Tensor:
        """`[..., inputs]` to `[..., outputs]`."""
        return super().forward(input.contiguous())


class Int8Handler(LinearHandler):
    """Swaps linears for `Int8Linear`."""

    name = "int8"
    multiple = MULTIPLE

    def swap(self, name: str, linear: nn.Linear) -> nn.Linear:
        """The same module with another class."""
        chosen = self.settings
        linear.__class__ = Int8Linear
        linear.config = Int8MixedPrecisionTrainingConfig(  # type: ignore[assignment]
            chosen.output, chosen.grad_input, chosen.grad_weight, module_swap=True
        )
        return linear
