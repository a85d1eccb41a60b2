"""Learning-rate schedules by name, and the built-in one: warmup, stable, decay. No torch.

A schedule is a pure function `(step, steps, settings) -> factor`: the share of `optimizer.lr` that
step `step` (the first is 1) of a schedule of `steps` trains with. It has no state, so a resumed run
asks for the factor of its step. The built-in rule is TorchTitan 0.2.2's;
`docs/guides/optimizers.md` has the formula. A third party adds one by the decorator
`register_schedule`, in a module that `job.custom_import` names, or by an entry point of the group
`torchtitan.schedules`, with a `Section` for `[lr_scheduler.args]`.
"""

from __future__ import annotations

import math
import traceback
from collections.abc import Callable, Iterable
from dataclasses import dataclass
from typing import TYPE_CHECKING, Any

from torchtitan.config.errors import ConfigError, ConfigIssue
from torchtitan.config.registry import Registry, require_text, settings_of, validated
from torchtitan.config.schema import LRScheduler, Section

if TYPE_CHECKING:
    import torch

Function = Callable[[int, int, Any], float]
BUILT_IN_NAME: str = LRScheduler.model_fields["name"].default
_TRIED_STEPS = 100


def lr_factor(step: int, steps: int, section: LRScheduler) -> float:
    """Return the share of the peak learning rate that step `step` (the first is 1) trains with.

    The last step of the warmup reaches the peak. The first step of the decay still has it, so that
    the last one is above `min_lr_factor`: no step is spent on a rate of zero.
    """
    assert step >= 1, "steps count from 1"
    warmup = section.warmup(steps)
    if step < warmup:
        return step / warmup
    length = section.decay(steps)
    decayed = step - (steps - length) - 1
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
    """Set the rate of every parameter group to `lr` times its `lr_factor`."""
    for optimizer in optimizers:
        for group in optimizer.param_groups:
            group["lr"] = lr * group.get("lr_factor", 1.0)


@dataclass(frozen=True)
class ScheduleEntry:
    """A schedule: its settings model, and a function that imports and returns its function."""

    settings: type[Section]
    """`LRScheduler` where the settings are the keys of `[lr_scheduler]` itself."""
    load: Callable[[], Function]


def entry_of(name: str, thing: Any) -> ScheduleEntry:
    """Return the entry of what is registered under `name`. Raises TypeError if it is no schedule.

    A function may have its settings model as an attribute `Settings`.
    """
    if isinstance(thing, ScheduleEntry):
        return thing
    if not callable(thing):
        raise TypeError(f"the schedule {name} is neither a function nor a ScheduleEntry")
    settings = settings_of(thing, f"the schedule {name}")
    return ScheduleEntry(settings, lambda: thing)


SCHEDULES: Registry[ScheduleEntry] = Registry("lr_scheduler.name", "torchtitan.schedules", entry_of)
SCHEDULES.add_built_in(BUILT_IN_NAME, ScheduleEntry(LRScheduler, lambda: lr_factor))


def register_schedule(
    name: str, settings: type[Section] = Section
) -> Callable[[Function], Function]:
    """Decorate a function to make it available as the schedule `name` with these settings.

    Raises ValueError for a taken name, TypeError for what is not a schedule.
    """
    require_text(name)

    def register(function: Function) -> Function:
        entry = ScheduleEntry(settings, lambda: function)
        SCHEDULES.register(name, entry, function.__module__)
        return function

    return register


def schedule_settings(section: LRScheduler) -> Any:
    """Return the checked settings that the schedule is called with.

    Raises ConfigError naming each unknown or invalid setting.
    """
    settings = SCHEDULES[section.name].settings
    if settings is LRScheduler:
        return section
    return validated(settings, section.args, "lr_scheduler.args")


class Schedule:
    """The factor of the learning rate by step."""

    def __init__(self, section: LRScheduler, training_steps: int):
        self._name = section.name
        self._steps = section.length(training_steps)
        self._settings = schedule_settings(section)
        self._function = SCHEDULES[section.name].load()

    def __call__(self, step: int) -> float:
        """Return the factor of a step. Raises ConfigError for an invalid one, and for any error."""
        try:
            given = self._function(step, self._steps, self._settings)
            if isinstance(given, str):
                raise TypeError(f"a number is needed, not the text {given!r}")
            factor = float(given)
        except Exception as error:
            lines = traceback.format_exc().rstrip().replace("\n", "\n    ")
            raise self._error(f"fails at step {step}:\n    {lines}") from error
        if not (math.isfinite(factor) and factor >= 0):
            raise self._error(f"gives {factor} for step {step}, which is not a finite factor >= 0")
        return factor

    def try_some(self) -> None:
        """Call the schedule for the first step, the last and some between; raise as a call does."""
        last = self._steps
        for step in sorted({1 + (last - 1) * n // _TRIED_STEPS for n in range(_TRIED_STEPS + 1)}):
            self(step)

    def _error(self, problem: str) -> ConfigError:
        fix = "correct the schedule, or its settings in [lr_scheduler.args]"
        return ConfigError(ConfigIssue("lr_scheduler.name", problem, fix, value=self._name))
