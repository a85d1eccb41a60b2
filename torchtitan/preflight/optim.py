"""Checks of `[optimizer]`, `[lr_scheduler]` and `[loss]`. Imports torch in no function."""

from collections.abc import Callable, Iterable, Iterator
from contextlib import suppress
from dataclasses import replace
from pathlib import Path
from typing import TYPE_CHECKING, Any

from torchtitan.config.errors import ConfigError, ConfigIssue, warning
from torchtitan.config.registry import Registry
from torchtitan.config.run_context import RunContext
from torchtitan.config.schema import LRScheduler, Section
from torchtitan.config.suggest import fix_of_registered
from torchtitan.data.named_sources import named_sources, validation_sets
from torchtitan.handlers.registry import HANDLERS
from torchtitan.loss.registry import LOSSES, DPOSettings, LossEntry, loss_settings
from torchtitan.optim.lr_scheduler import BUILT_IN_NAME, SCHEDULES, Schedule, schedule_settings
from torchtitan.optim.registry import (
    OPTIMIZERS,
    OPTIONAL_KEYS,
    check_patterns,
    optimizer_settings,
)
from torchtitan.weights.hub import is_hub_path
from torchtitan.weights.recognise import kind_of

if TYPE_CHECKING:
    from torch import nn

_PAIRS = "preference"
_SCHEDULE_KEYS = [key for key in LRScheduler.model_fields if key not in ("name", "args")]


def check_static(context: RunContext) -> list[ConfigIssue]:
    """Check names, their settings, and settings against each other."""
    return [
        *_optimizer(context),
        *_schedule(context),
        *_learning_rate(context),
        *_warmup_and_decay(context),
        *_loss(context),
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
    section, steps = context.config.lr_scheduler, context.config.training.steps
    if section.name != BUILT_IN_NAME:
        return
    warmup = section.warmup(steps)
    if warmup > steps:
        problem = f"the run ends before the warmup does: training.steps = {steps}"
        fix = f"set it to at most {steps}, or train for more steps"
        yield ConfigIssue("lr_scheduler.warmup_steps", problem, fix, value=warmup)
    elif section.decay_ratio is not None and warmup + section.decay(steps) > steps:
        decay = f"a decay of {section.decay(steps)} steps"
        problem = f"{decay} and a warmup of {warmup} do not fit into {steps} steps"
        fix = "lower it, or shorten the warmup"
        yield ConfigIssue("lr_scheduler.decay_ratio", problem, fix, value=section.decay_ratio)


def _loss(context: RunContext) -> list[ConfigIssue]:
    section = context.config.loss
    found = _named(section, "loss.name", "a loss", LOSSES, loss_settings)
    if found:
        return found
    entry, degree = LOSSES[section.name], context.config.parallelism.tensor_parallel_degree
    found = [*_pairs(context, entry), *_reference(context)]
    if degree == 1 or entry.supports_vocab_parallel:
        return found
    problem = (
        "this loss needs the logits of the whole vocabulary, and a rank has a part of them with"
        f" parallelism.tensor_parallel_degree = {degree}"
    )
    fix = "derive the loss from ChunkedLoss (docs/losses.md), or set the degree to 1"
    return [*found, ConfigIssue("loss.name", problem, fix, section.name)]


def _pairs(context: RunContext, entry: LossEntry) -> Iterator[ConfigIssue]:
    """Check that a loss of pairs gets pairs."""
    config = context.config
    if not entry.reads_pairs:
        return
    for named in [*named_sources(config.training, config.data), *validation_sets(config)]:
        if named.data.format != _PAIRS:
            problem = f"the loss {config.loss.name} compares two answers, and these data have one"
            fix = f'set it to "{_PAIRS}", for rows with a chosen and a rejected answer'
            issue = ConfigIssue("data.format", problem, fix, named.data.format)
            yield named.under_own_key(issue)


def _reference(context: RunContext) -> Iterator[ConfigIssue]:
    """Check the reference of DPO."""
    config = context.config
    settings = loss_settings(config.loss)
    if not isinstance(settings, DPOSettings) or not settings.needs_reference:
        return
    if settings.reference == "base":
        entries = [HANDLERS.get(name) for name in config.model.handlers]
        if not any(entry is not None and entry.adds_adapters for entry in entries):
            problem = "no handler in model.handlers adds adapters, so there is no base below them"
            fix = 'add one that does, or set it to "start"'
            yield ConfigIssue("loss.args.reference", problem, fix, settings.reference)
    path = settings.reference_path
    if path is not None and not is_hub_path(path) and kind_of(Path(path)) is None:
        problem = "is no checkpoint" if Path(path).exists() else "does not exist"
        fix = "name a step, a Hugging Face folder, Meta's or a GGUF, or leave it out"
        issue = ConfigIssue("loss.args.reference_path", problem, fix, path)
        yield replace(issue, missing_asset=not Path(path).exists())
