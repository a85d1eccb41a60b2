"""Checks of `[optimizer]`, `[lr_scheduler]` and `[loss]`. Imports torch in no function."""

from collections.abc import Callable, Iterable, Iterator
from contextlib import suppress
from typing import TYPE_CHECKING, Any

from torchtitan.config.errors import ConfigError, ConfigIssue, warning
from torchtitan.config.registry import Registry
from torchtitan.config.run_context import RunContext
from torchtitan.config.schema import LRScheduler, Section
from torchtitan.config.suggest import fix_of_registered
from torchtitan.loss.registry import LOSSES, loss_settings
from torchtitan.optim.lr_scheduler import BUILT_IN_NAME, SCHEDULES, Schedule, schedule_settings
from torchtitan.optim.registry import (
    OPTIMIZERS,
    OPTIONAL_KEYS,
    check_patterns,
    optimizer_settings,
)

if TYPE_CHECKING:
    from torch import nn

_COMMON_KEYS = ("name", "args", "total_steps")
_SCHEDULE_KEYS = [key for key in LRScheduler.model_fields if key not in _COMMON_KEYS]


def check_static(context: RunContext) -> list[ConfigIssue]:
    """Check names, their settings, and settings against each other."""
    return [
        *_optimizer(context),
        *_schedule(context),
        *_learning_rate(context),
        *_warmup_and_decay(context),
        *_loss(context),
        *_record(context),
    ]


def check_environment(context: RunContext) -> list[ConfigIssue]:
    """Ask a registered schedule for its factors at some steps."""
    section = context.config.lr_scheduler
    try:
        if section.name != BUILT_IN_NAME:
            Schedule(section, context.config.training.steps).try_some()
    except ConfigError as error:
        return error.problems
    return []


def check_model(context: RunContext, model: "nn.Module") -> list[ConfigIssue]:
    """Check the optimizer's settings that name parameters."""
    section = context.config.optimizer
    shapes = {name: tuple(tensor.shape) for name, tensor in model.named_parameters()}
    issues = check_patterns(section, list(shapes))
    with suppress(ConfigError):  # reported by `check_static`
        entry = OPTIMIZERS.get(section.name)
        if entry is not None and entry.check_names is not None:
            issues += entry.check_names(optimizer_settings(section), shapes)
    return issues


def _named(
    section: Any, key: str, kind: str, registry: Registry[Any], settings: Callable[[Any], object]
) -> list[ConfigIssue]:
    """Check the registered name of a section, and the settings in its `args`."""
    try:
        if registry.get(section.name) is None:
            fix = fix_of_registered(section.name, registry)
            return [ConfigIssue(key, f"is not {kind}", fix, section.name)]
        settings(section)
    except ConfigError as error:
        return error.problems
    return []


def _optimizer(context: RunContext) -> Iterator[ConfigIssue]:
    section = context.config.optimizer
    found = _named(section, "optimizer.name", "an optimizer", OPTIMIZERS, optimizer_settings)
    if found:
        yield from found
        return
    entry = OPTIMIZERS[section.name]
    yield from _unused(section, "optimizer", set(OPTIONAL_KEYS) - set(entry.uses), section.name)
    if section.early_step_in_backward and entry.not_in_backward:
        problem = f"{section.name} cannot: {entry.not_in_backward}"
        fix = "set it to false, or take AdamW"
        yield ConfigIssue("optimizer.early_step_in_backward", problem, fix, True)


def _schedule(context: RunContext) -> Iterator[ConfigIssue]:
    section = context.config.lr_scheduler
    found = _named(section, "lr_scheduler.name", "a schedule", SCHEDULES, schedule_settings)
    yield from found
    if section.name != BUILT_IN_NAME:
        yield from () if found else _unused(section, "lr_scheduler", _SCHEDULE_KEYS, section.name)
    elif section.args:
        problem = f"{section.name} has its settings in [lr_scheduler] itself"
        fix = f"write its keys there: {', '.join(_SCHEDULE_KEYS)}"
        yield ConfigIssue("lr_scheduler.args", problem, fix, ", ".join(section.args))


def _unused(section: Section, table: str, keys: Iterable[str], name: str) -> Iterator[ConfigIssue]:
    """Yield a warning for each setting that `name` does not use.

    It may stand in a file whose optimizer or schedule the command line replaces.
    """
    keys = set(keys)
    for key, field in type(section).model_fields.items():
        value = getattr(section, key)
        if key in keys and value != field.default:
            fix = f"leave it out; {name} has its own settings in [{table}.args]"
            yield warning(f"{table}.{key}", f"{name} has no use for it", fix, value)


def _learning_rate(context: RunContext) -> Iterator[ConfigIssue]:
    section = context.config.optimizer
    if section.lr == 0:
        fix = "set a positive learning rate"
        yield warning("optimizer.lr", "with a learning rate of 0 nothing is learnt", fix, 0.0)
    first_index: dict[str, int] = {}
    for index, group in enumerate(section.param_groups):
        first = first_index.setdefault(group.pattern, index)
        if first != index:
            problem = f"param_groups[{first}] has the same pattern, and the first match wins"
            key = f"optimizer.param_groups[{index}].pattern"
            yield ConfigIssue(key, problem, "remove one of the two", value=group.pattern)


def _warmup_and_decay(context: RunContext) -> Iterator[ConfigIssue]:
    section, trained = context.config.lr_scheduler, context.config.training.steps
    steps = section.length(trained)
    if steps < trained:
        problem = f"the schedule would end before the run: training.steps = {trained}"
        fix = f"set it to at least {trained}, or leave it out"
        yield ConfigIssue("lr_scheduler.total_steps", problem, fix, value=steps)
    if section.name != BUILT_IN_NAME:
        return
    warmup = section.warmup(steps)
    if warmup > steps:
        key = "training.steps" if steps == trained else "lr_scheduler.total_steps"
        problem = f"the schedule ends before the warmup does: {key} = {steps}"
        fix = f"set it to at most {steps}, or train for more steps"
        yield ConfigIssue("lr_scheduler.warmup_steps", problem, fix, value=warmup)
    elif section.decay_ratio is not None and warmup + section.decay(steps) > steps:
        decay = f"a decay of {section.decay(steps)} steps"
        problem = f"{decay} and a warmup of {warmup} do not fit into {steps} steps"
        fix = "lower it, or shorten the warmup"
        yield ConfigIssue("lr_scheduler.decay_ratio", problem, fix, value=section.decay_ratio)


def _record(context: RunContext) -> Iterator[ConfigIssue]:
    steps = context.config.debug.record
    if steps and context.config.optimizer.early_step_in_backward:
        problem = "optimizer.early_step_in_backward frees each gradient before the step ends"
        yield ConfigIssue("debug.record", problem, "leave out one of the two", steps)


def _loss(context: RunContext) -> list[ConfigIssue]:
    section = context.config.loss
    found = _named(section, "loss.name", "a loss", LOSSES, loss_settings)
    degree = context.config.parallelism.tensor_parallel_degree
    if found or degree == 1 or LOSSES[section.name].supports_vocab_parallel:
        return found
    problem = (
        "this loss needs the logits of the whole vocabulary, and a rank has a part of them with"
        f" parallelism.tensor_parallel_degree = {degree}"
    )
    fix = "derive the loss from ChunkedLoss (docs/guides/own_loss.md), or set the degree to 1"
    return [ConfigIssue("loss.name", problem, fix, section.name)]
