"""A second pass that fails, on this rank alone perhaps."""

from types import SimpleNamespace
from typing import Any

import pytest
import torch

from torchtitan.config import NonFiniteError
from torchtitan.parallel.random_streams import RandomStreams
from torchtitan.training.nonfinite_origin import StepBatch, find_origin


class Runner:
    """Has no memory for a second pass."""

    def __init__(self) -> None:
        self.streams = RandomStreams(0, torch.device("cpu"))
        self.terms: dict[str, torch.Tensor] = {}

    def forward_backward(self, *_: Any) -> None:
        raise torch.OutOfMemoryError("no memory")


def test_a_run_does_not_go_on_from_within_a_second_pass() -> None:
    """One that ends has an error of its own to report."""
    model: Any = SimpleNamespace(parts=[], parameters=[])
    world: Any = SimpleNamespace(rank=0)

    def find(goes_on: bool) -> str:
        runner: Any = Runner()
        return find_origin(world, model, runner, StepBatch(3, (), 1), str, goes_on)

    assert find(False) == ""
    with pytest.raises(NonFiniteError, match=r"step 3: .* a second pass failed: .*no memory"):
        find(True)
