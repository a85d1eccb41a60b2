"""A second pass that fails, on this rank alone perhaps."""

from types import SimpleNamespace
from typing import Any

import pytest
import torch
from torch import nn

from torchtitan.config import NonFiniteError
from torchtitan.parallel.random_streams import RandomStreams
from torchtitan.training.nonfinite_origin import StepBatch, find_origin


class Runner:
    """Runner of the step after, without memory for a second pass."""

    def __init__(self, model: nn.Module) -> None:
        self.model = model
        self.streams = RandomStreams(0, torch.device("cpu"))
        self.streams.step = 4
        self.terms = {"of": torch.tensor(4.0)}

    def forward_backward(self, *_: Any) -> None:
        assert self.streams.step == 3
        self.terms = {}
        self.model(torch.ones(1, 2)).sum().backward()
        raise torch.OutOfMemoryError("no memory")


def test_a_run_does_not_go_on_from_within_a_second_pass() -> None:
    """One that ends has an error of its own to report. Both are left as the step after needs them,
    whose gradients are there on a GPU."""
    world: Any = SimpleNamespace(rank=0)
    linear = nn.Linear(2, 1)
    model: Any = SimpleNamespace(parts=[linear], parameters=[linear.weight, linear.bias])
    runner: Any = Runner(linear)

    def find(goes_on: bool) -> str:
        linear.weight.grad = torch.full((1, 2), 7.0)
        return find_origin(world, model, runner, StepBatch(3, (), 1), str, goes_on)

    assert find(False) == "" and linear.weight.grad is None
    with pytest.raises(NonFiniteError, match=r"step 3: .* a second pass failed: .*no memory"):
        find(True)
    assert torch.equal(linear.weight.grad, torch.full((1, 2), 7.0)) and linear.bias.grad is None
    assert runner.streams.step == 4 and runner.terms
    assert not linear._forward_hooks and not linear._forward_pre_hooks
