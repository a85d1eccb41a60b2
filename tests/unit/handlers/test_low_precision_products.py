"""What the linears of handlers for low precision compute: each of their three products, alone."""

from typing import Any

import pytest
import torch
import torch.nn.functional as F
from torch import Tensor, nn

from tests.unit.handlers.test_low_precision_conversion import handler_of

INPUTS, OUTPUTS, TOKENS = 64, 96, (2, 32)


class Block(nn.Module):
    def __init__(self, bias: bool) -> None:
        super().__init__()
        self.linear = nn.Linear(INPUTS, OUTPUTS, bias=bias)


def products(name: str | None, bias: bool = False, **settings: Any) -> dict[str, Tensor]:
    """Output and gradients in bfloat16, and in float32 without a handler. Rows of all factors
    differ in size, so that a scale that is shared along the wrong dimension shows."""
    torch.manual_seed(0)
    block = Block(bias)
    x = torch.randn(*TOKENS, INPUTS) * torch.linspace(0.1, 3, TOKENS[1]).unsqueeze(1)
    grad = torch.randn(*TOKENS, OUTPUTS) * torch.linspace(2, 0.2, TOKENS[1]).unsqueeze(1)
    if name is not None:
        block, x, grad = block.bfloat16(), x.bfloat16(), grad.bfloat16()
        handler_of(name, **settings).convert(block)
    x.requires_grad_()
    out = block.linear(x)
    assert out.dtype == x.dtype
    out.backward(grad)
    found = {"output": out.detach(), "grad_input": x.grad, "grad_weight": block.linear.weight.grad}
    if bias:
        found["grad_bias"] = block.linear.bias.grad
    return {key: value.float() for key, value in found.items() if value is not None}


def errors(found: dict[str, Tensor]) -> dict[str, float]:
    """Norms of the differences to float32, relative."""
    expected = products(None, bias="grad_bias" in found)
    assert found.keys() == expected.keys()
    return {
        key: ((value - expected[key]).norm() / expected[key].norm()).item()
        for key, value in found.items()
    }


def as_bfloat16(error: float) -> bool:
    """Rounded to bfloat16 and no further."""
    return error < 0.006


FLAGS = ("output", "grad_input", "grad_weight")


@pytest.mark.parametrize("only", FLAGS)
def test_int8_rounds_what_it_is_told_to(only: str) -> None:
    for key, error in errors(products("int8", **{flag: flag == only for flag in FLAGS})).items():
        assert as_bfloat16(error) == (key != only), (key, error)
        assert error < 0.02


@pytest.mark.parametrize(
    ("name", "settings", "bound"),
    [
        ("int8", {}, 0.02),
        ("float8", {}, 0.06),
        ("float8", {"emulate": True}, 0.06),
        ("float8", {"recipe_name": "rowwise"}, 0.06),
        ("float8", {"recipe_name": "rowwise_with_gw_hp"}, 0.06),
        ("mxfp8", {}, 0.06),
    ],
)
@pytest.mark.parametrize("bias", [False, True])
def test_products_are_those_of_a_linear(
    name: str, settings: dict[str, Any], bound: float, bias: bool
) -> None:
    exact = ["grad_bias", *["grad_weight"] * (settings.get("recipe_name", "")[-5:] == "gw_hp")]
    for key, error in errors(products(name, bias, **settings)).items():
        assert as_bfloat16(error) == (key in exact), (key, error)
        assert error < bound, (key, error)


def test_bitnet_multiplies_with_three_values() -> None:
    """Those nearest to the weights in units of their mean magnitude."""
    torch.manual_seed(0)
    weight = Block(False).linear.weight.detach().bfloat16()
    scale = weight.float().abs().mean()
    ternary = (weight.float() / scale).round().clamp(-1, 1)
    assert set(ternary.unique().tolist()) == {-1.0, 0.0, 1.0}
    found = products("bitnet")
    torch.manual_seed(0)
    Block(False)
    x = (torch.randn(*TOKENS, INPUTS) * torch.linspace(0.1, 3, TOKENS[1]).unsqueeze(1)).bfloat16()
    grad = torch.randn(*TOKENS, OUTPUTS) * torch.linspace(2, 0.2, TOKENS[1]).unsqueeze(1)
    x, grad = x.float(), grad.bfloat16().float()
    expected = {
        "output": F.linear(x, ternary * scale),
        "grad_input": grad @ (ternary * scale),
        "grad_weight": grad.flatten(0, 1).T @ x.flatten(0, 1),
    }
    for key, value in expected.items():
        assert (found[key] - value).norm() / value.norm() < 0.02, key
