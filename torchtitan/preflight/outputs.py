"""Checks of what a run writes besides checkpoints: metrics, traces, memory snapshots."""

import importlib.util
import os
import re
from collections.abc import Iterator
from pathlib import Path

from torchtitan.config.errors import ConfigError, ConfigIssue
from torchtitan.config.run_context import RunContext
from torchtitan.config.suggest import issues_of_names
from torchtitan.metrics.sinks import SINKS, sink_settings
from torchtitan.utils.environment import read_wandb

_FOLDER_NAME = re.compile(r"[A-Za-z0-9_-][A-Za-z0-9._-]{0,127}")
_FILE_PREFIX = re.compile(r"[A-Za-z_-]([A-Za-z0-9._-]{0,126}[A-Za-z._-])?")
"""It starts with no dot, and does not end with a digit: the rank follows."""
_TAKEN_NAMES = ("config.toml", "run_status.json", "metrics.jsonl", "metrics", "wandb")
_WANDB_MODES = ("online", "offline", "disabled", "shared", "dryrun", "run")
_WANDB_NOT_IN_PROJECT = "/\\#?%:"


def check_static(context: RunContext) -> list[ConfigIssue]:
    """Check sinks, the profiler's steps and the names of folders."""
    return [
        *_sinks(context),
        *_profiling(context),
        *_snapshots(context),
        *_folders(context),
    ]


def check_environment(context: RunContext) -> list[ConfigIssue]:
    """Check that folders can be written and packages are installed."""
    metrics, profiling = context.config.metrics, context.config.profiling
    problems: list[ConfigIssue] = []
    if metrics.enable_tensorboard:
        if importlib.util.find_spec("tensorboard") is None:
            problems.append(_missing_package("metrics.enable_tensorboard", "tensorboard"))
        problems += _unwritable(context, "metrics.save_tb_folder", metrics.save_tb_folder)
    if profiling.enable_profiling:
        key = "profiling.save_traces_folder"
        problems += _unwritable(context, key, profiling.save_traces_folder)
    if profiling.enable_memory_snapshot:
        key = "profiling.save_memory_snapshot_folder"
        problems += _unwritable(context, key, profiling.save_memory_snapshot_folder)
    if metrics.enable_wandb:
        problems += _wandb(context)
    return problems


def _wandb(context: RunContext) -> list[ConfigIssue]:
    """Check wandb: without its package nothing would be logged; a login may still come."""
    if importlib.util.find_spec("wandb") is None:
        return [_missing_package("metrics.enable_wandb", "wandb")]
    problems, environment = _unwritable(context, "metrics.enable_wandb", "wandb"), read_wandb()
    if environment.mode is not None and environment.mode not in _WANDB_MODES:
        problem, fix = "is no mode of wandb's", f"set it to one of {', '.join(_WANDB_MODES[:4])}"
        problems.append(ConfigIssue("WANDB_MODE", problem, fix, value=environment.mode))
    project = environment.project or ""
    if set(project) & set(_WANDB_NOT_IN_PROJECT) or len(project) > 128:
        problem = f"a project's name has up to 128 characters, and none of {_WANDB_NOT_IN_PROJECT}"
        problems.append(
            ConfigIssue("WANDB_PROJECT", problem, "shorten it to a plain name", project)
        )
    return problems


def _missing_package(key: str, package: str) -> ConfigIssue:
    """Return the issue of a switch whose package is missing; the training machine may have it."""
    problem = f"the package {package} is not installed"
    fix = f"run `pip install {package}`, or set it to false"
    return ConfigIssue(key, problem, fix, value=True, missing_asset=True)


def _sinks(context: RunContext) -> Iterator[ConfigIssue]:
    config = context.config
    chosen = config.metrics.sinks
    yield from issues_of_names("sink", "metrics.sinks", chosen, config.sinks, SINKS)
    for name in dict.fromkeys([*chosen, *config.sinks]):
        try:
            if name in SINKS:
                sink_settings(config.sinks, name)
        except ConfigError as error:
            yield from error.problems


def _profiling(context: RunContext) -> Iterator[ConfigIssue]:
    section, steps = context.config.profiling, context.config.training.steps
    if not section.enable_profiling:
        return
    length = section.profiler_warmup + section.profiler_active
    if section.profile_freq < length:
        problem = (
            f"a trace takes profiler_warmup + profiler_active = {length} steps, "
            "so the next would have to start before it ends"
        )
        fix = f"set it to at least {length}"
        yield ConfigIssue("profiling.profile_freq", problem, fix, value=section.profile_freq)
    elif section.profile_freq > steps:
        problem = f"the first trace ends after the run: training.steps = {steps}"
        fix = f"set it to at most {steps}"
        value = section.profile_freq
        yield ConfigIssue("profiling.profile_freq", problem, fix, value=value, severity="warning")


def _snapshots(context: RunContext) -> Iterator[ConfigIssue]:
    section, steps = context.config.profiling, context.config.training.steps
    if not section.enable_memory_snapshot:
        return
    if context.device_type == "cpu":
        problem = "only CUDA's allocator keeps a history of its blocks, and this run is on the CPU"
        fix = "set it to false; memory_peak_gib in the metrics is what a process takes on a CPU"
        yield ConfigIssue("profiling.enable_memory_snapshot", problem, fix, value=True)
    elif section.profile_freq > steps and not section.enable_profiling:
        problem = f"no snapshot is due before the run ends: training.steps = {steps}"
        fix = f"set it to at most {steps}, unless you only want the one when memory runs out"
        value = section.profile_freq
        yield ConfigIssue("profiling.profile_freq", problem, fix, value=value, severity="warning")


def _folders(context: RunContext) -> Iterator[ConfigIssue]:
    config = context.config
    prefix = config.comm.save_traces_file_prefix
    if not _FILE_PREFIX.fullmatch(prefix):
        problem = "it must be the start of a file's name, which ends with the rank"
        fix = "use letters, `.`, `_` and `-`, with no dot at the start and no digit at the end"
        yield ConfigIssue("comm.save_traces_file_prefix", problem, fix, value=prefix)
    folders = {
        "metrics.save_tb_folder": config.metrics.save_tb_folder,
        "profiling.save_traces_folder": config.profiling.save_traces_folder,
        "profiling.save_memory_snapshot_folder": config.profiling.save_memory_snapshot_folder,
        "comm.save_traces_folder": config.comm.save_traces_folder,
    }
    taken = {config.checkpoint.folder: "checkpoint.folder"}
    for key, folder in folders.items():
        if not _FOLDER_NAME.fullmatch(folder):
            problem = "it must be the name of a folder below job.dump_folder"
            fix = "use letters, digits, `.`, `_` and `-` only, not starting with a dot"
            yield ConfigIssue(key, problem, fix, value=folder)
        elif folder in _TAKEN_NAMES:
            problem = "the run folder has something else of that name"
            yield ConfigIssue(key, problem, "use another name", value=folder)
        elif folder in taken:
            yield ConfigIssue(key, f"{taken[folder]} is the same", "use another name", value=folder)
        taken.setdefault(folder, key)


def _unwritable(context: RunContext, key: str, name: str) -> list[ConfigIssue]:
    """Check that the folder can be written or made; create nothing."""
    dump_folder = Path(context.config.job.dump_folder)
    if not context.full and not os.path.lexists(dump_folder):
        return []  # it will lie on another machine
    folder = dump_folder.resolve() / name
    try:
        if dump_folder.exists() and not dump_folder.is_dir():
            return []  # reported for job.dump_folder
        existing = next(path for path in (folder, *folder.parents) if path.exists())
    except OSError:  # a name that is too long, also reported there
        return []
    is_folder = existing.is_dir()
    if not is_folder:
        problem, fix = f"{existing} is not a folder", "move that file away, or use another name"
    elif not os.access(existing, os.W_OK | os.X_OK):
        problem, fix = f"{existing} is not writable", "make it writable, or use another folder"
    else:
        return []
    return [ConfigIssue(key, problem, fix, value=name, missing_asset=is_folder)]
