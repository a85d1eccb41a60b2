"""The schedule against values worked out by hand."""

import math

import pytest
import torch
from torch import nn

from torchtitan.components.lr_scheduler import lr_factor, set_learning_rates
from torchtitan.components.optimizer import build_optimizers
from torchtitan.config.training_sections import LRScheduler, Optimizer


def factors(steps: int, **settings: object) -> list[float]:
    section = LRScheduler(**settings)
    return [lr_factor(step, steps, section) for step in range(1, steps + 1)]


def test_warmup_then_decay_to_the_end() -> None:
    expected = [1 / 3, 2 / 3] + [k / 9 for k in (8, 7, 6, 5, 4, 3, 2, 1)]
    assert factors(10, warmup_steps=2) == pytest.approx(expected, rel=1e-15)


def test_warmup_stable_decay() -> None:
    expected = [1 / 3, 2 / 3, 1, 1, 1, 1, 1, 3 / 4, 2 / 4, 1 / 4]
    assert factors(10, warmup_steps=2, decay_ratio=0.3) == pytest.approx(expected, rel=1e-15)


def test_no_warmup_and_no_decay() -> None:
    assert factors(3, warmup_steps=0, decay_ratio=0.0) == [1.0, 1.0, 1.0]


def test_warmup_of_the_whole_run() -> None:
    assert factors(3, warmup_steps=3) == [1 / 4, 2 / 4, 3 / 4]


@pytest.mark.parametrize(
    ("decay_type", "shape"),
    [
        ("linear", lambda x: 1 - x),
        ("sqrt", lambda x: 1 - math.sqrt(x)),
        ("cosine", lambda x: (1 + math.cos(math.pi * x)) / 2),
    ],
)
def test_shapes_and_the_minimum(decay_type: str, shape: object) -> None:
    found = factors(8, warmup_steps=0, decay_ratio=0.5, decay_type=decay_type, min_lr_factor=0.1)
    expected = [1.0] * 4 + [0.1 + 0.9 * shape(k / 5) for k in (1, 2, 3, 4)]  # type: ignore
    assert found == pytest.approx(expected, rel=1e-15)


def test_after_the_last_step_it_stays_at_the_minimum() -> None:
    section = LRScheduler(warmup_steps=1, min_lr_factor=0.25)
    assert lr_factor(11, 10, section) == lr_factor(99, 10, section) == 0.25
    without_decay = LRScheduler(warmup_steps=1, decay_ratio=0.0)
    assert lr_factor(11, 10, without_decay) == 1.0


def test_groups_get_their_share() -> None:
    model = nn.ModuleDict({"norm": nn.RMSNorm(2), "wq": nn.Linear(2, 2)})
    section = Optimizer(lr=1.0, param_groups=[{"pattern": "norm.*", "lr_factor": 0.5}])
    optimizers = build_optimizers(section, [model], torch.device("cpu"))
    set_learning_rates(optimizers, 0.2)
    assert [group["lr"] for group in optimizers[0].param_groups] == [0.1, 0.2]
