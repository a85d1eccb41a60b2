"""The handler `int8`: linears that multiply 8-bit integers; weights stay in high precision.

torchao's mixed-precision training (a prototype there): each row of one factor and each column of
the other is rounded to integers by its largest magnitude, and the sums are scaled back. Only the
arithmetic is torchao's, because its own linear does not compile.
"""

from typing import Any

import torch
from torch import Tensor, nn
from torchao.prototype.quantized_training.int8_mixed_precision import _dynamic_int8_mm

from torchtitan.handlers.linears import LinearHandler
from torchtitan.handlers.settings import INT8_MULTIPLE


class _IntegerProduct(torch.autograd.Function):
    @staticmethod
    def forward(ctx: Any, x: Tensor, weight: Tensor, rounded: tuple[bool, bool, bool]) -> Tensor:
        ctx.save_for_backward(x, weight)
        ctx.rounded = rounded
        return _product(x.reshape(-1, x.size(-1)), weight.T, rounded[0]).unflatten(0, x.shape[:-1])

    @staticmethod
    def backward(ctx: Any, grad: Tensor) -> tuple[Tensor, Tensor, None]:
        x, weight = ctx.saved_tensors
        _, for_input, for_weight = ctx.rounded
        rows, inputs = grad.reshape(-1, grad.size(-1)), x.reshape(-1, x.size(-1))
        grad_input = _product(rows, weight, for_input).unflatten(0, x.shape[:-1])
        return grad_input, _product(inputs.T, rows, for_weight).T, None


def _product(a: Tensor, b: Tensor, in_int8: bool) -> Tensor:
    return _dynamic_int8_mm(a, b) if in_int8 else a @ b


class Int8Linear(nn.Linear):
    """A linear with some of its products in int8."""

    rounded: tuple[bool, bool, bool]
    """True where the output, the gradient of the input, the gradient of the weight are in int8."""

    def forward(self, input: Tensor) -> Tensor:
        """Map `[..., inputs]` to `[..., outputs]`."""
        out = _IntegerProduct.apply(input, self.weight, self.rounded)
        return out if self.bias is None else out + self.bias


class Int8Handler(LinearHandler):
    """Swaps linears for `Int8Linear`."""

    name = "int8"
    multiple = INT8_MULTIPLE

    def swap(self, name: str, linear: nn.Linear) -> nn.Linear:
        """Return the same module with another class."""
        chosen = self.settings
        linear.__class__ = Int8Linear
        rounded = chosen.output, chosen.grad_input, chosen.grad_weight
        linear.rounded = rounded  # type: ignore[assignment]
        return linear
