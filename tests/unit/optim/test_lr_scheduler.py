"""The schedule against values worked out by hand."""

import math
import re
from pathlib import Path
from typing import Any

import pytest
import torch
from torch import nn

from torchtitan.config.schema import LRScheduler, Optimizer
from torchtitan.optim.lr_scheduler import Schedule, lr_factor, set_learning_rates
from torchtitan.optim.optimizer import build_optimizers

SHAPES: dict[str, Any] = {
    "linear": lambda x: 1 - x,
    "sqrt": lambda x: 1 - math.sqrt(x),
    "cosine": lambda x: (1 + math.cos(math.pi * x)) / 2,
}


_ROW = r"^\| (\d+) \| (\d+) \| (\S+) \| here, 0\.2\.2 \| (.+) \|$"


def factors(steps: int, **settings: object) -> list[float]:
    section = LRScheduler(**settings)
    return [lr_factor(step, steps, section) for step in range(1, steps + 1)]


def torchtitan_factors(steps: int, warmup: int, ratio: float | None, shape: Any) -> list[float]:
    """What TorchTitan 0.2.2 trains with: it counts steps from 0, and adds a stable step."""
    decay = steps - warmup if ratio is None else round(steps * ratio)
    stable_end = steps + 1 - decay
    found = []
    for step in range(steps):
        if step < warmup:
            found.append((step + 1) / warmup)
        else:
            found.append(1.0 if step < stable_end else shape((step + 1 - stable_end) / decay))
    return found


@pytest.mark.parametrize("decay_type", SHAPES)
@pytest.mark.parametrize("min_lr_factor", [0.0, 0.1, 1.0])
@pytest.mark.parametrize(
    ("steps", "warmup", "ratio"),
    [
        (5, 2, None),
        (10, 2, 0.8),
        (10, 2, 0.3),
        (10, 2, 0.0),
        (6, 0, None),
        (6, 0, 1.0),
        (6, 1, None),
        (3, 3, None),
        (3, 3, 0.0),
        (4, 3, None),
        (1, 0, 1.0),
        (1, 1, None),
    ],
)
def test_the_rule_is_torchtitans_and_holds_the_peak(
    steps: int, warmup: int, ratio: float | None, decay_type: str, min_lr_factor: float
) -> None:
    def shape(progress: float) -> float:
        return min_lr_factor + (1 - min_lr_factor) * SHAPES[decay_type](progress)

    settings = {"warmup_steps": warmup, "decay_ratio": ratio, "decay_type": decay_type}
    found = factors(steps, **settings, min_lr_factor=min_lr_factor)
    assert found == pytest.approx(torchtitan_factors(steps, warmup, ratio, shape), rel=1e-15)
    # The peak itself, from the last step of the warmup on; never 0, and never below the minimum.
    first = max(warmup, 1)
    assert found[first - 1] == max(found) == 1.0
    assert steps == first or found[first] == 1.0 or warmup == 0
    assert min(found) > 0 and min(found[first - 1 :]) >= min_lr_factor


@pytest.mark.parametrize(
    ("steps", "settings", "expected"),
    [
        (5, {"warmup_steps": 2}, [1 / 2, 1, 1, 2 / 3, 1 / 3]),
        (
            10,
            {"warmup_steps": 2, "decay_ratio": 0.8},
            [1 / 2, 1, 1, 7 / 8, 6 / 8, 5 / 8, 4 / 8, 3 / 8, 2 / 8, 1 / 8],
        ),
        (3, {"warmup_steps": 0, "decay_ratio": 0.0}, [1, 1, 1]),
        (3, {"warmup_steps": 3}, [1 / 3, 2 / 3, 1]),
        (4, {"warmup_steps": 0, "decay_ratio": 1.0}, [1, 3 / 4, 2 / 4, 1 / 4]),
        (4, {"warmup_steps": 1}, [1, 1, 2 / 3, 1 / 3]),
    ],
)
def test_values_worked_out_by_hand(
    steps: int, settings: dict[str, Any], expected: list[float]
) -> None:
    assert factors(steps, **settings) == pytest.approx(expected, rel=1e-15)


def test_a_run_is_the_beginning_of_a_longer_schedule() -> None:
    schedule = Schedule(LRScheduler(warmup_steps=2, total_steps=10), 4)
    assert [schedule(step) for step in range(1, 5)] == factors(10, warmup_steps=2)[:4]
    assert (
        Schedule(LRScheduler(warmup_steps=2), 4)(4) == factors(4, warmup_steps=2)[3] != schedule(4)
    )


def test_the_table_of_the_page_is_what_is_computed() -> None:
    """Its rows: settings, this library's factors; the formula above it is the one tested here."""
    page = (Path(__file__).parents[3] / "docs" / "guides" / "optimizers.md").read_text("utf-8")
    ours = re.findall(_ROW, page, re.MULTILINE)
    assert len(ours) == 4
    for steps, warmup, ratio, row in ours:
        ratio = None if ratio == "unset" else float(ratio)
        found = factors(int(steps), warmup_steps=int(warmup), decay_ratio=ratio)
        assert [float(value) for value in row.split(", ")] == pytest.approx(found, abs=0.0005)


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
