"""What must hold of what a config names: optimizer, schedule, sinks, and the settings of each. No
torch."""

from collections.abc import Iterable, Iterator

from torchtitan.components.optimizer_registry import (
    OPTIMIZERS,
    OPTIONAL_KEYS,
    optimizer_settings,
)
from torchtitan.components.schedule_registry import (
    BUILT_IN_NAME,
    SCHEDULES,
    Schedule,
    schedule_settings,
)
from torchtitan.components.sink_registry import SINKS, sink_settings
from torchtitan.config.errors import ConfigError, Problem
from torchtitan.config.facts import Facts
from torchtitan.config.section import Section
from torchtitan.config.suggest import fix_of_registered
from torchtitan.config.training_sections import LRScheduler

_SCHEDULE_KEYS = [key for key in LRScheduler.model_fields if key not in ("name", "args")]


def check_named(facts: Facts) -> list[Problem]:
    """Names that nobody has, settings that do not fit what is named."""
    return [*_optimizer(facts), *_schedule(facts), *_sinks(facts)]


def probe_schedule(facts: Facts) -> list[Problem]:
    """What a schedule of somebody's own says to some steps."""
    section = facts.config.lr_scheduler
    if section.name == BUILT_IN_NAME:
        return []
    try:
        Schedule(section, facts.config.training.steps).try_some()
    except ConfigError as error:
        return error.problems
    return []


def _optimizer(facts: Facts) -> Iterator[Problem]:
    section = facts.config.optimizer
    try:
        entry = OPTIMIZERS.get(section.name)
        if entry is None:
            fix = fix_of_registered(section.name, OPTIMIZERS)
            yield Problem("optimizer.name", "is not an optimizer", fix, value=section.name)
            return
        optimizer_settings(section)
    except ConfigError as error:
        yield from error.problems
        return
    yield from _unused(section, "optimizer", set(OPTIONAL_KEYS) - set(entry.uses), section.name)
    if section.early_step_in_backward and entry.not_in_backward:
        problem = f"{section.name} cannot: {entry.not_in_backward}"
        fix = "set it to false, or take AdamW"
        yield Problem("optimizer.early_step_in_backward", problem, fix, value=True)


def _schedule(facts: Facts) -> Iterator[Problem]:
    section = facts.config.lr_scheduler
    try:
        if SCHEDULES.get(section.name) is None:
            fix = fix_of_registered(section.name, SCHEDULES)
            yield Problem("lr_scheduler.name", "is not a schedule", fix, value=section.name)
            return
        schedule_settings(section)
    except ConfigError as error:
        yield from error.problems
        return
    if section.name != BUILT_IN_NAME:
        yield from _unused(section, "lr_scheduler", _SCHEDULE_KEYS, section.name)
    elif section.args:
        problem = f"{section.name} has its settings in [lr_scheduler] itself"
        fix = f"write its keys there: {', '.join(_SCHEDULE_KEYS)}"
        yield Problem("lr_scheduler.args", problem, fix, value=", ".join(section.args))


def _unused(section: Section, table: str, keys: Iterable[str], name: str) -> Iterator[Problem]:
    """Settings that are not used, in the order of the section. They may stand in a file whose
    optimizer or schedule the command line replaces."""
    keys = set(keys)
    for key, field in type(section).model_fields.items():
        value = getattr(section, key)
        if key in keys and value != field.default:
            fix = f"leave it out; {name} has its own settings in [{table}.args]"
            problem = f"{name} has no use for it"
            yield Problem(f"{table}.{key}", problem, fix, value=value, severity="warning")


def _sinks(facts: Facts) -> Iterator[Problem]:
    config = facts.config
    chosen = config.metrics.sinks
    for place, name in enumerate(chosen):
        if name not in SINKS:
            fix = fix_of_registered(name, SINKS)
            yield Problem("metrics.sinks", "is not a sink", fix, value=name)
        elif name in chosen[:place]:
            yield Problem("metrics.sinks", "is listed twice", "list it once", value=name)
    for name in config.sinks:
        if name not in SINKS and name not in chosen:
            yield Problem(f"sinks.{name}", "is not a sink", fix_of_registered(name, SINKS))
    for name in dict.fromkeys([*chosen, *config.sinks]):
        try:
            if name in SINKS:
                sink_settings(config, name)
        except ConfigError as error:
            yield from error.problems
