"""The handler `int8`: linears whose products are of 8-bit integers, weights staying as they are.

torchao's mixed-precision training (a prototype there): each row of one factor and each column of
the other is rounded to integers by its largest magnitude, and the sums are scaled back. torchao
does the arithmetic; its own linear is one that the compiler cannot look into.
"""

from typing import Any

import torch
from torch import Tensor, nn
from torchao.prototype.quantized_training.int8_mixed_precision import _dynamic_int8_mm

from torchtitan.handlers.int8_settings import MULTIPLE
from torchtitan.handlers.linears import LinearHandler


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


def _product(a: Tensor, b: Tensor, of_integers: bool) -> Tensor:
    return _dynamic_int8_mm(a, b) if of_integers else a @ b


class Int8Linear(nn.Linear):
    """A linear, some of whose products are of integers."""

    rounded: tuple[bool, bool, bool]
    """Whether the output, the gradients of the input and of the weight are."""

    def forward(self, input: Tensor) -> Tensor:
        """`[..., inputs]` to `[..., outputs]`."""
        out = _IntegerProduct.apply(input, self.weight, self.rounded)
        return out if self.bias is None else out + self.bias


class Int8Handler(LinearHandler):
    """Swaps linears for `Int8Linear`."""

    name = "int8"
    multiple = MULTIPLE

    def swap(self, name: str, linear: nn.Linear) -> nn.Linear:
        """The same module with another class."""
        chosen = self.settings
        linear.__class__ = Int8Linear
        rounded = chosen.output, chosen.grad_input, chosen.grad_weight
        linear.rounded = rounded  # type: ignore[assignment]
        return linear
