"""Checks of `model.handlers` and `[handlers.NAME]`."""

import traceback
from collections.abc import Callable, Iterable, Iterator, Mapping
from functools import partial
from importlib.util import find_spec
from pathlib import Path
from typing import TYPE_CHECKING, Any

from torchtitan.checkpoint.config_diff import stored_value
from torchtitan.checkpoint.decision import starts_anew
from torchtitan.checkpoint.manifest import InvalidCheckpoint, read_manifest
from torchtitan.checkpoint.stored_run import StoredRun
from torchtitan.config import ConfigError, ConfigIssue, JobConfig
from torchtitan.config.errors import errors_of, warning
from torchtitan.config.registry import BUILT_IN
from torchtitan.config.run_context import RunContext
from torchtitan.config.suggest import issues_of_names
from torchtitan.handlers.registry import HANDLERS, HandlerEntry, handler_settings
from torchtitan.handlers.settings import LoraSettings
from torchtitan.loss.registry import DPOSettings, loss_settings
from torchtitan.utils.remote import is_remote
from torchtitan.weights.recognise import kind_of

if TYPE_CHECKING:
    from torch import nn


def check_static(context: RunContext) -> list[ConfigIssue]:
    """Check names, order, combinations and settings."""
    chosen, tables = context.config.model.handlers, context.config.handlers
    issues = issues_of_names("handler", "model.handlers", chosen, tables, HANDLERS)
    if issues:
        return issues
    for name in dict.fromkeys([*chosen, *tables]):
        issues += _asked(name, "Settings", partial(_settings_problems, context, name))
    if issues:
        return issues
    for name in tables.keys() - {*chosen}:
        problem = f'has no effect: "{name}" is not in model.handlers'
        issues.append(warning(f"handlers.{name}", problem, "list it there, or leave the table out"))
    entries = {name: HANDLERS[name] for name in chosen}
    issues += [*_check_order(entries), *_check_packages(entries)]
    for name, entry in entries.items():
        if not errors_of(issues):
            settings = handler_settings(context.config, name)
            issues += _asked(name, "check_static", partial(entry.check_static, context, settings))
    return issues


def _settings_problems(context: RunContext, name: str) -> list[ConfigIssue]:
    handler_settings(context.config, name)
    return []


def _asked(name: str, what: str, ask: Callable[[], Iterable[ConfigIssue]]) -> list[ConfigIssue]:
    """Return what a handler finds; if it raises, an issue with its own traceback."""
    try:
        return list(ask())
    except ConfigError as error:
        return error.problems
    except Exception:
        lines = traceback.format_exc().rstrip().replace("\n", "\n    ")
        problem = f"its {what} ({HANDLERS.origin(name)}) fails:\n    {lines}"
        return [ConfigIssue("model.handlers", problem, "correct the handler", value=name)]


def _check_packages(chosen: dict[str, HandlerEntry]) -> Iterator[ConfigIssue]:
    """Check that the packages exist, without importing them."""
    for name, entry in chosen.items():
        if entry.package and find_spec(entry.package.partition(".")[0]) is None:
            problem = f"it needs {entry.package}, which is not installed"
            fix = f"pip install {entry.package}"
            if entry.extra:
                fix = f"pip install -e '.[{entry.extra}]' -c constraints.txt, in the clone"
            yield ConfigIssue("model.handlers", problem, fix, value=name)


def _check_order(chosen: dict[str, HandlerEntry]) -> Iterator[ConfigIssue]:
    names = list(chosen)
    for place, (name, entry) in enumerate(chosen.items()):
        for earlier in (other for other in entry.after if other in names[place:]):
            fix = f"list {earlier} before {name}"
            yield ConfigIssue("model.handlers", f"has to come after {earlier}", fix, name)
        for other in entry.excludes:
            if other in chosen:
                problem, fix = f"cannot be combined with {other}", f"leave out {name} or {other}"
                yield ConfigIssue("model.handlers", problem, fix, name)


def check_environment(context: RunContext) -> list[ConfigIssue]:
    """Ask each handler whether this machine's devices can do what it needs."""
    config = context.config
    issues = []
    for name in config.model.handlers:
        ask = partial(HANDLERS[name].check_environment, context, handler_settings(config, name))
        issues += _asked(name, "check_environment", ask)
    return issues


def check_model(context: RunContext, model: "nn.Module") -> list[ConfigIssue]:
    """Ask each handler that has a `check(model)` or `check_start(model)`; imports torch.

    Handlers after a registered one or one with adapters, which add parameters, judge when the model
    is converted.
    """
    from torchtitan.distributed.parallel_dims import ParallelDims
    from torchtitan.handlers.named import NamedHandler

    config = context.config
    dims = ParallelDims.from_section(config.parallelism, context.world_size)
    issues: list[ConfigIssue] = []
    stored = _config_of_start(config)
    for name in config.model.handlers:
        handler = NamedHandler(name, config, dims)
        found = handler.check(model)
        if not found and stored is not None:
            is_stored = name in (stored_value(stored, "model.handlers") or ())
            found = [] if is_stored else handler.check_start(model)
            found += _check_scale(config, name, stored)
        issues += found
        if HANDLERS.origin(name) != BUILT_IN or handler.adds_adapters:
            break
    return issues


def _config_of_start(config: JobConfig) -> Mapping[str, Any] | None:
    """Return the config of the step that this start loads, empty for other weights or none.

    None if it is a resume, which has what handlers add, or if the step cannot be read.
    """
    section = config.checkpoint
    if not section.enable:
        return {}
    try:
        run = StoredRun(Path(config.job.dump_folder).resolve(), section.folder)
        if run.good and not starts_anew(config) and not _has_frozen_start(config):
            return None
        path = section.initial_load_path
        if path is None or is_remote(path) or kind_of(Path(path)) != "step":
            return {}
        return read_manifest(Path(path)).info.get("config") or {}
    except (OSError, InvalidCheckpoint):  # reported by the checks of the folders
        return None


def _check_scale(config: JobConfig, name: str, stored: Mapping[str, Any]) -> Iterator[ConfigIssue]:
    """Check that adapters go on with the scale that they were trained with."""
    from torchtitan.handlers.lora import scale_of

    settings, tables = handler_settings(config, name), stored.get("handlers") or {}
    if not isinstance(settings, LoraSettings):
        return
    for other in stored_value(stored, "model.handlers") or ():
        if other in HANDLERS and HANDLERS[other].adds_adapters:
            theirs = LoraSettings().model_copy(update=tables.get(other))
            if theirs.rank == settings.rank and scale_of(theirs) != scale_of(settings):
                problem = f"{config.checkpoint.initial_load_path} has adapters of another scale"
                fix = f"set it to {theirs.alpha}, and rslora to {str(theirs.rslora).lower()}"
                yield ConfigIssue(f"handlers.{name}.alpha", problem, fix, settings.alpha)


def _has_frozen_start(config: JobConfig) -> bool:
    """Return whether the loss compares with a copy of the start, which is made at every start."""
    try:
        settings = loss_settings(config.loss)
    except ConfigError:
        return False
    if not isinstance(settings, DPOSettings):
        return False
    return settings.needs_reference and settings.reference == "start"
