"""Activation checkpointing: what is computed again, and what is kept."""

from collections import Counter

import pytest
import torch
from torch import nn
from torch.utils._python_dispatch import TorchDispatchMode
from torch.utils.checkpoint import CheckpointPolicy

from torchtitan.config.schema import ActivationCheckpoint
from torchtitan.parallel.activation_checkpoint import (
    _keep_or_recompute,
    apply_activation_checkpoint,
)


class Block(nn.Module):
    """Four matrix products and an attention."""

    def __init__(self) -> None:
        super().__init__()
        self.layers = nn.ModuleList(nn.Linear(8, 8, bias=False) for _ in range(4))
        self.num_forwards = 0

    def forward(self, x: torch.Tensor) -> torch.Tensor:
        self.num_forwards += 1
        for layer in self.layers:
            x = torch.tanh(layer(x))
        return torch.nn.functional.scaled_dot_product_attention(x, x, x, is_causal=True)


class Count(TorchDispatchMode):
    """Counts operators while entered."""

    def __init__(self) -> None:
        super().__init__()
        self.operators: Counter[str] = Counter()

    def __torch_dispatch__(self, func, types, args=(), kwargs=None):  # type: ignore[no-untyped-def]
        self.operators[str(func)] += 1
        return func(*args, **(kwargs or {}))


def run(section: ActivationCheckpoint, num_blocks: int = 4) -> tuple[list[Block], Counter[str]]:
    """Blocks after a forward and a backward, and the operators of the backward."""
    torch.manual_seed(0)
    blocks = {f"layers.{n}": Block() for n in range(num_blocks)}
    apply_activation_checkpoint(blocks, section)
    x = torch.randn(2, 2, 6, 8, requires_grad=True)
    out = x
    for block in blocks.values():
        out = block(out)
    with Count() as count:
        out.square().sum().backward()
    for block in blocks.values():
        assert all(parameter.grad is not None for parameter in block.parameters())
        assert [name for name, _ in block.named_parameters()] == [
            f"layers.{n}.weight" for n in range(4)
        ]
    return list(blocks.values()), count.operators


@pytest.mark.parametrize(
    ("mode", "option", "expected"),
    [
        ("none", "2", [1, 1, 1, 1]),
        ("full", "2", [2, 2, 2, 2]),
        ("selective", "1", [2, 2, 2, 2]),
        ("selective", "2", [1, 2, 1, 2]),
        ("selective", "3", [1, 1, 2, 1]),
    ],
)
def test_blocks_that_run_twice(mode: str, option: str, expected: list[int]) -> None:
    section = ActivationCheckpoint(mode=mode, selective_ac_option=option)  # type: ignore[arg-type]
    blocks, _ = run(section)
    assert [block.num_forwards for block in blocks] == expected


def test_by_operator_keeps_attention_and_every_second_product() -> None:
    plain = run(ActivationCheckpoint(mode="none"), 1)[1]
    full = run(ActivationCheckpoint(mode="full"), 1)[1]
    chosen = run(ActivationCheckpoint(mode="selective", selective_ac_option="op"), 1)[1]

    def recomputed(operators: Counter[str], name: str) -> int:
        return sum((operators - plain)[key] for key in operators if name in key)

    assert recomputed(full, "aten.mm") == 4
    assert recomputed(chosen, "aten.mm") == 2
    assert recomputed(full, "tanh.default") == 4
    assert recomputed(chosen, "tanh.default") == 4
    attention = "attention_for_cpu.default"
    assert recomputed(full, attention) == 1
    assert recomputed(chosen, attention) == 0


@pytest.mark.parametrize("mode", ["full", "selective"])
def test_gradients_are_the_same_bits(mode: str) -> None:
    plain, _ = run(ActivationCheckpoint(mode="none"))
    options = ["op", "2"] if mode == "selective" else ["2"]
    for option in options:
        other, _ = run(ActivationCheckpoint(mode=mode, selective_ac_option=option))  # type: ignore[arg-type]
        for block, expected in zip(other, plain, strict=True):
            for parameter, same in zip(block.parameters(), expected.parameters(), strict=True):
                assert torch.equal(parameter.grad, same.grad)  # type: ignore[arg-type]


class Noise(nn.Module):
    """As dropout, it draws random numbers in its forward."""

    def __init__(self) -> None:
        super().__init__()
        self.weight = nn.Parameter(torch.tensor(2.0))

    def forward(self, x: torch.Tensor) -> torch.Tensor:
        return x * torch.rand_like(x) * self.weight


@pytest.mark.parametrize("option", ["op", "1"])
@pytest.mark.parametrize("preserve", [True, False])
def test_a_recomputation_draws_the_same_random_numbers(option: str, preserve: bool) -> None:
    block = Noise()
    section = ActivationCheckpoint(
        mode="selective", selective_ac_option=option, preserve_rng_state=preserve
    )
    apply_activation_checkpoint({"layers.0": block}, section)
    out = block(torch.ones(64)).sum()
    out.backward()
    expected = out.detach() / block.weight.detach()  # the sum of the numbers of the forward
    assert torch.isclose(block.weight.grad, expected).item() is preserve  # type: ignore[arg-type]


@pytest.mark.parametrize("kernel", ["flash", "efficient"])
def test_attention_that_drops_is_computed_again(kernel: str) -> None:
    """Else what follows it would not find the random numbers where the forward did."""
    operator = getattr(torch.ops.aten, f"_scaled_dot_product_{kernel}_attention").default
    qkv = [torch.empty(1, 1, 2, 4, device="meta")] * 3
    more = [None, True] if kernel == "efficient" else []

    def policy(*dropout: float, **named: float) -> CheckpointPolicy:
        return _keep_or_recompute({}, None, operator, *qkv, *more, *dropout, **named)

    assert policy() == policy(0.0) == policy(dropout_p=0.0) == CheckpointPolicy.MUST_SAVE
    assert policy(0.1) == policy(dropout_p=0.1) == CheckpointPolicy.PREFER_RECOMPUTE
