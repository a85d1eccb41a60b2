"""Schedules of the learning rate by name. No torch.

A third party adds one by the decorator `register_schedule`, in a module that `job.custom_import`
names, or by an entry point of the group `torchtitan.schedules`. Either gives a function
`(step, training_steps, settings) -> factor`: the share of `optimizer.lr` that step `step` (the
first is 1) trains with. It has no state, so a resumed run asks for the rate of its step. What
`[lr_scheduler.args]` may hold is given beside it, as a `Section`.
"""

import math
import traceback
from collections.abc import Callable
from dataclasses import dataclass
from typing import Any

from torchtitan.config.errors import ConfigError, ConfigIssue
from torchtitan.config.registry import Registry, lazily, require_text
from torchtitan.config.schema import LRScheduler, Section
from torchtitan.config.value_errors import validated

Function = Callable[[int, int, Any], float]
BUILT_IN_NAME: str = LRScheduler.model_fields["name"].default
_TRIED_STEPS = 100


@dataclass(frozen=True)
class ScheduleEntry:
    """A schedule: its settings' model, and a function that imports and returns its function."""

    settings: type[Section]
    """`LRScheduler` itself where the settings are the keys of `[lr_scheduler]`."""
    load: Callable[[], Function]


def entry_of(name: str, thing: Any) -> ScheduleEntry:
    """What is registered under `name`, if it is one. Raises TypeError. A function may have its
    settings' model as an attribute `Settings`."""
    if isinstance(thing, ScheduleEntry):
        return thing
    if not callable(thing):
        raise TypeError(f"the schedule {name} is neither a function nor a ScheduleEntry")
    settings = getattr(thing, "Settings", Section)
    if not (isinstance(settings, type) and issubclass(settings, Section)):
        raise TypeError(f"Settings of the schedule {name} is not a Section")
    return ScheduleEntry(settings, lambda: thing)


SCHEDULES: Registry[ScheduleEntry] = Registry("lr_scheduler.name", "torchtitan.schedules", entry_of)
SCHEDULES.add_built_in(
    BUILT_IN_NAME,
    ScheduleEntry(LRScheduler, lazily("torchtitan.optim.lr_scheduler:lr_factor")),
)


def register_schedule(
    name: str, settings: type[Section] = Section
) -> Callable[[Function], Function]:
    """Decorator: make a function available as `name`; `settings` is what its args may be.

    Raises ValueError for a taken name, TypeError for what is no schedule.
    """

    require_text(name)

    def register(function: Function) -> Function:
        entry = ScheduleEntry(settings, lambda: function)
        SCHEDULES.register(name, entry, function.__module__)
        return function

    return register


def schedule_settings(section: LRScheduler) -> Any:
    """What the schedule is given, checked. Raises ConfigError naming each setting that is unknown
    or unfit."""
    settings = SCHEDULES[section.name].settings
    if settings is LRScheduler:
        return section
    return validated(settings, section.args, "lr_scheduler.args")


class Schedule:
    """The learning rate's factor by step."""

    def __init__(self, section: LRScheduler, training_steps: int):
        self._name = section.name
        self._training_steps = training_steps
        self._settings = schedule_settings(section)
        self._function = SCHEDULES[section.name].load()

    def __call__(self, step: int) -> float:
        """Raises ConfigError for what is no factor, and for what the schedule raises."""
        try:
            given = self._function(step, self._training_steps, self._settings)
            if isinstance(given, str):
                raise TypeError(f"a number is needed, not the text {given!r}")
            factor = float(given)
        except Exception as error:
            lines = traceback.format_exc().rstrip().replace("\n", "\n    ")
            raise self._error(f"fails at step {step}:\n    {lines}") from error
        if not (math.isfinite(factor) and factor >= 0):
            raise self._error(f"gives {factor} for step {step}, which is no share of a rate")
        return factor

    def try_some(self) -> None:
        """Ask for the first step, the last, and some in between. Raises as a call does."""
        last = self._training_steps
        for step in sorted({1 + (last - 1) * n // _TRIED_STEPS for n in range(_TRIED_STEPS + 1)}):
            self(step)

    def _error(self, problem: str) -> ConfigError:
        fix = "correct the schedule, or its settings in [lr_scheduler.args]"
        return ConfigError(ConfigIssue("lr_scheduler.name", problem, fix, value=self._name))
