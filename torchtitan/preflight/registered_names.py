"""What must hold of what a config names: optimizer, schedule, sinks, and the settings of each. No
torch."""

from collections.abc import Iterable, Iterator

from torchtitan.config.errors import ConfigError, ConfigIssue
from torchtitan.config.run_context import RunContext
from torchtitan.config.schema import LRScheduler, Section
from torchtitan.config.suggest import fix_of_registered
from torchtitan.metrics.sinks import SINKS, sink_settings
from torchtitan.optim.lr_scheduler import (
    BUILT_IN_NAME,
    SCHEDULES,
    Schedule,
    schedule_settings,
)
from torchtitan.optim.registry import (
    OPTIMIZERS,
    OPTIONAL_KEYS,
    optimizer_settings,
)

_SCHEDULE_KEYS = [key for key in LRScheduler.model_fields if key not in ("name", "args")]


def check_named(context: RunContext) -> list[ConfigIssue]:
    """Names that nobody has, settings that do not fit what is named."""
    return [*_optimizer(context), *_schedule(context), *_sinks(context)]


def probe_schedule(context: RunContext) -> list[ConfigIssue]:
    """What a schedule of somebody's own says to some steps."""
    section = context.config.lr_scheduler
    if section.name == BUILT_IN_NAME:
        return []
    try:
        Schedule(section, context.config.training.steps).try_some()
    except ConfigError as error:
        return error.problems
    return []


def _optimizer(context: RunContext) -> Iterator[ConfigIssue]:
    section = context.config.optimizer
    try:
        entry = OPTIMIZERS.get(section.name)
        if entry is None:
            fix = fix_of_registered(section.name, OPTIMIZERS)
            yield ConfigIssue("optimizer.name", "is not an optimizer", fix, value=section.name)
            return
        optimizer_settings(section)
    except ConfigError as error:
        yield from error.problems
        return
    yield from _unused(section, "optimizer", set(OPTIONAL_KEYS) - set(entry.uses), section.name)
    if section.early_step_in_backward and entry.not_in_backward:
        problem = f"{section.name} cannot: {entry.not_in_backward}"
        fix = "set it to false, or take AdamW"
        yield ConfigIssue("optimizer.early_step_in_backward", problem, fix, value=True)


def _schedule(context: RunContext) -> Iterator[ConfigIssue]:
    section = context.config.lr_scheduler
    try:
        if SCHEDULES.get(section.name) is None:
            fix = fix_of_registered(section.name, SCHEDULES)
            yield ConfigIssue("lr_scheduler.name", "is not a schedule", fix, value=section.name)
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
        yield ConfigIssue("lr_scheduler.args", problem, fix, value=", ".join(section.args))


def _unused(section: Section, table: str, keys: Iterable[str], name: str) -> Iterator[ConfigIssue]:
    """Settings that are not used, in the order of the section. They may stand in a file whose
    optimizer or schedule the command line replaces."""
    keys = set(keys)
    for key, field in type(section).model_fields.items():
        value = getattr(section, key)
        if key in keys and value != field.default:
            fix = f"leave it out; {name} has its own settings in [{table}.args]"
            problem = f"{name} has no use for it"
            yield ConfigIssue(f"{table}.{key}", problem, fix, value=value, severity="warning")


def _sinks(context: RunContext) -> Iterator[ConfigIssue]:
    config = context.config
    chosen = config.metrics.sinks
    for place, name in enumerate(chosen):
        if name not in SINKS:
            fix = fix_of_registered(name, SINKS)
            yield ConfigIssue("metrics.sinks", "is not a sink", fix, value=name)
        elif name in chosen[:place]:
            yield ConfigIssue("metrics.sinks", "is listed twice", "list it once", value=name)
    for name in config.sinks:
        if name not in SINKS and name not in chosen:
            yield ConfigIssue(f"sinks.{name}", "is not a sink", fix_of_registered(name, SINKS))
    for name in dict.fromkeys([*chosen, *config.sinks]):
        try:
            if name in SINKS:
                sink_settings(config.sinks, name)
        except ConfigError as error:
            yield from error.problems
