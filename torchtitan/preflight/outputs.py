"""Checks of what a run writes besides checkpoints: metrics, traces, memory snapshots."""

import importlib.util
import os
import re
from collections.abc import Iterator
from pathlib import Path

from torchtitan.config.errors import ConfigError, ConfigIssue, warning
from torchtitan.config.run_context import RunContext
from torchtitan.config.suggest import issues_of_names
from torchtitan.metrics.sinks import SINKS, sink_settings
from torchtitan.preflight.folders import check_name, check_writable
from torchtitan.utils.environment import read_wandb

_TRACES = "profiling.save_traces_folder"
_SNAPSHOTS = "profiling.save_memory_snapshot_folder"
_FILE_PREFIX = re.compile(r"[A-Za-z_-]([A-Za-z0-9._-]{0,126}[A-Za-z._-])?")
"""It starts with no dot, and does not end with a digit: the rank follows."""
_WANDB_MODES = ("online", "offline", "disabled", "shared", "dryrun", "run")
_WANDB_NOT_IN_PROJECT = "/\\#?%:"


def check_static(context: RunContext) -> list[ConfigIssue]:
    """Check sinks, the profiler's steps and the names of folders."""
    return [*_sinks(context), *_profiling(context), *_folders(context)]


def check_environment(context: RunContext) -> list[ConfigIssue]:
    """Check that folders can be written and packages are installed."""
    metrics, profiling = context.config.metrics, context.config.profiling
    issues: list[ConfigIssue] = []
    if metrics.enable_tensorboard and importlib.util.find_spec("tensorboard") is None:
        issues.append(_missing_package("metrics.enable_tensorboard", "tensorboard"))
    for key, is_used, folder in (
        ("metrics.save_tb_folder", metrics.enable_tensorboard, metrics.save_tb_folder),
        (_TRACES, profiling.enable_profiling, profiling.save_traces_folder),
        (_SNAPSHOTS, profiling.enable_memory_snapshot, profiling.save_memory_snapshot_folder),
    ):
        if is_used:
            issues += _unwritable(context, key, folder)
    if metrics.enable_wandb:
        issues += _wandb(context)
    return issues


def _wandb(context: RunContext) -> list[ConfigIssue]:
    """Check wandb: without its package nothing would be logged; a login may still come."""
    if importlib.util.find_spec("wandb") is None:
        return [_missing_package("metrics.enable_wandb", "wandb")]
    issues, environment = _unwritable(context, "metrics.enable_wandb", "wandb"), read_wandb()
    if environment.mode is not None and environment.mode not in _WANDB_MODES:
        problem, fix = "is no mode of wandb's", f"set it to one of {', '.join(_WANDB_MODES[:4])}"
        issues.append(ConfigIssue("WANDB_MODE", problem, fix, value=environment.mode))
    project = environment.project or ""
    if set(project) & set(_WANDB_NOT_IN_PROJECT) or len(project) > 128:
        problem = f"a project's name has up to 128 characters, and none of {_WANDB_NOT_IN_PROJECT}"
        issues.append(ConfigIssue("WANDB_PROJECT", problem, "use a plain name", project))
    return issues


def _missing_package(key: str, package: str) -> ConfigIssue:
    """Return the issue of a switch whose package is missing; the training machine may have it."""
    problem = f"the package {package} is not installed"
    fix = f"run `pip install {package}`, or set it to false"
    return ConfigIssue(key, problem, fix, value=True, missing_asset=True)


def _sinks(context: RunContext) -> Iterator[ConfigIssue]:
    config, chosen = context.config, context.config.metrics.sinks
    yield from issues_of_names("sink", "metrics.sinks", chosen, config.sinks, SINKS)
    for name in dict.fromkeys([*chosen, *config.sinks]):
        try:
            if name in SINKS:
                sink_settings(config.sinks, name)
        except ConfigError as error:
            yield from error.problems


def _profiling(context: RunContext) -> Iterator[ConfigIssue]:
    section, steps = context.config.profiling, context.config.training.steps
    key, frequency = "profiling.profile_freq", section.profile_freq
    length = section.profiler_warmup + section.profiler_active
    if section.enable_memory_snapshot and context.device_type == "cpu":
        problem = "only CUDA's allocator keeps a history of its blocks, and this run is on the CPU"
        fix = "set it to false; memory_peak_gib in the metrics is what a process takes on a CPU"
        yield ConfigIssue("profiling.enable_memory_snapshot", problem, fix, True)
    if section.enable_profiling and frequency < length:
        problem = f"a trace takes profiler_warmup + profiler_active = {length} steps"
        yield ConfigIssue(key, problem, f"set it to at least {length}", frequency)
    elif (section.enable_profiling or section.enable_memory_snapshot) and frequency > steps:
        problem = f"no trace or snapshot is due before the run ends: training.steps = {steps}"
        yield warning(key, problem, f"set it to at most {steps}", frequency)


def _folders(context: RunContext) -> Iterator[ConfigIssue]:
    config = context.config
    prefix = config.comm.save_traces_file_prefix
    if not _FILE_PREFIX.fullmatch(prefix):
        problem = "it must be the start of a file's name, which ends with the rank"
        fix = "use letters, `.`, `_` and `-`, with no dot at the start and no digit at the end"
        yield ConfigIssue("comm.save_traces_file_prefix", problem, fix, value=prefix)
    folders = {
        "metrics.save_tb_folder": config.metrics.save_tb_folder,
        _TRACES: config.profiling.save_traces_folder,
        _SNAPSHOTS: config.profiling.save_memory_snapshot_folder,
        "comm.save_traces_folder": config.comm.save_traces_folder,
    }
    taken = {config.checkpoint.folder: "checkpoint.folder"}
    for key, folder in folders.items():
        yield from check_name(key, folder)
        if folder in taken:
            yield ConfigIssue(key, f"{taken[folder]} is the same", "use another name", folder)
        taken.setdefault(folder, key)


def _unwritable(context: RunContext, key: str, name: str) -> list[ConfigIssue]:
    dump_folder = Path(context.config.job.dump_folder)
    if not context.full and not os.path.lexists(dump_folder):
        return []  # it will lie on another machine
    if any(not issue.missing_asset for issue in check_writable("", dump_folder.absolute(), "")):
        return []  # reported for job.dump_folder
    return check_writable(key, dump_folder.resolve() / name, name)
