"""The learning rate as a function of the step: warmup, stable, decay.

A pure function rather than an object with state: a resumed run asks for the rate of its step, and
there is nothing to save. The phases are TorchTitan's: the rate rises linearly over `warmup_steps`,
stays at its peak, and falls over the last `decay_ratio` of the run to `min_lr_factor` of the peak.
"""

import math
from collections.abc import Iterable

import torch

from torchtitan.components.checks import decay_steps
from torchtitan.config.training_sections import LRScheduler


def lr_factor(step: int, training_steps: int, section: LRScheduler) -> float:
    """The share of the peak learning rate that step `step` (the first is 1) trains with.

    Neither phase reaches its end point: the first step of a warmup is above 0, and the last step of
    the decay is above `min_lr_factor`, so that no step is spent on a rate of zero.
    """
    assert step >= 1, "steps count from 1"
    warmup = section.warmup(training_steps)
    if step <= warmup:
        return step / (warmup + 1)
    length = decay_steps(training_steps, section)
    decayed = step - (training_steps - length)
    if decayed <= 0 or length == 0:
        return 1.0
    progress = min(decayed, length + 1) / (length + 1)
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
