"""The learning rate as a function of the step: warmup, stable, decay.

A pure function rather than an object with state: a resumed run asks for the rate of its step, and
there is nothing to save. The rule is TorchTitan 0.2.2's; `docs/optimizers.md` has it as a formula.
"""

import math
from collections.abc import Iterable

import torch

from torchtitan.config.schema import LRScheduler


def lr_factor(step: int, training_steps: int, section: LRScheduler) -> float:
    """Return the share of the peak learning rate that step `step` (the first is 1) trains with.

    The last step of the warmup reaches the peak. The first step of the decay still has it, so that
    the last one is above `min_lr_factor`: no step is spent on a rate of zero.
    """
    assert step >= 1, "steps count from 1"
    warmup = section.warmup(training_steps)
    if step < warmup:
        return step / warmup
    length = section.decay(training_steps)
    decayed = step - (training_steps - length) - 1
    if decayed <= 0 or length == 0:
        return 1.0
    progress = min(decayed / length, 1.0)
    if section.decay_type == "linear":
        height = 1 - progress
    elif section.decay_type == "sqrt":
        height = 1 - math.sqrt(progress)
    else:
        height = 0.5 * (1 + math.cos(math.pi * progress))
    return section.min_lr_factor + (1 - section.min_lr_factor) * height


def set_learning_rates(optimizers: Iterable[torch.optim.Optimizer], lr: float) -> None:
    """Give every parameter group `lr` times its own `lr_factor`."""
    for optimizer in optimizers:
        for group in optimizer.param_groups:
            group["lr"] = lr * group.get("lr_factor", 1.0)
