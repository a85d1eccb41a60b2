"""What can be wrong with the settings of optimizer and schedule, and of all that watches a run:
metrics, profiler, memory snapshots, records of collectives. No torch."""

import importlib.util
import os
import re
from collections.abc import Iterator
from pathlib import Path

from torchtitan.config.errors import ConfigIssue
from torchtitan.config.run_context import RunContext
from torchtitan.optim.lr_scheduler import BUILT_IN_NAME
from torchtitan.preflight.registered_names import check_named, probe_schedule
from torchtitan.utils.environment import read_wandb

_FOLDER_NAME = re.compile(r"[A-Za-z0-9_-][A-Za-z0-9._-]{0,127}")
_FILE_PREFIX = re.compile(r"[A-Za-z_-]([A-Za-z0-9._-]{0,126}[A-Za-z._-])?")
"""It starts with no dot, and does not end with a digit: the rank follows."""
_TAKEN_NAMES = ("config.toml", "run_status.json", "metrics.jsonl", "metrics", "wandb")
_WANDB_MODES = ("online", "offline", "disabled", "shared", "dryrun", "run")
_WANDB_NOT_IN_PROJECT = "/\\#?%:"


def check_static(context: RunContext) -> list[ConfigIssue]:
    """Problems of several settings together; single values are checked by their sections."""
    return [
        *check_named(context),
        *_check_optimizer(context),
        *_check_schedule(context),
        *_check_profiling(context),
        *_check_snapshots(context),
        *_check_folders(context),
    ]


def check_environment(context: RunContext) -> list[ConfigIssue]:
    """Problems of this machine: folders that cannot be written, packages that are missing."""
    metrics, profiling = context.config.metrics, context.config.profiling
    problems = probe_schedule(context)
    if metrics.enable_tensorboard:
        if importlib.util.find_spec("tensorboard") is None:
            problems.append(_missing_package("metrics.enable_tensorboard", "tensorboard"))
        problems += _probe_folder(context, "metrics.save_tb_folder", metrics.save_tb_folder)
    if profiling.enable_profiling:
        key = "profiling.save_traces_folder"
        problems += _probe_folder(context, key, profiling.save_traces_folder)
    if profiling.enable_memory_snapshot:
        key = "profiling.save_memory_snapshot_folder"
        problems += _probe_folder(context, key, profiling.save_memory_snapshot_folder)
    if metrics.enable_wandb:
        problems += _probe_wandb(context)
    return problems


def _probe_wandb(context: RunContext) -> list[ConfigIssue]:
    """Without its package nothing would be logged, so that is an error; a login may still come."""
    if importlib.util.find_spec("wandb") is None:
        return [_missing_package("metrics.enable_wandb", "wandb")]
    problems, environment = _probe_folder(context, "metrics.enable_wandb", "wandb"), read_wandb()
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
    """The problem of a switch whose package is not there; the machine that trains may have it."""
    problem = f"the package {package} is not installed"
    fix = f"run `pip install {package}`, or set it to false"
    return ConfigIssue(key, problem, fix, value=True, missing_asset=True)


def _check_optimizer(context: RunContext) -> Iterator[ConfigIssue]:
    section = context.config.optimizer
    if section.lr == 0:
        problem = "with a learning rate of 0 nothing is learnt"
        fix = "set a positive learning rate"
        yield ConfigIssue("optimizer.lr", problem, fix, value=section.lr, severity="warning")
    first_index: dict[str, int] = {}
    for index, group in enumerate(section.param_groups):
        first = first_index.setdefault(group.pattern, index)
        if first != index:
            problem = f"param_groups[{first}] has the same pattern, and the first match wins"
            key = f"optimizer.param_groups[{index}].pattern"
            yield ConfigIssue(key, problem, "remove one of the two", value=group.pattern)


def _check_schedule(context: RunContext) -> Iterator[ConfigIssue]:
    section, steps = context.config.lr_scheduler, context.config.training.steps
    if section.name != BUILT_IN_NAME:
        return
    warmup = section.warmup(steps)
    if warmup > steps:
        problem = f"the run ends before the warmup does: training.steps = {steps}"
        fix = f"set it to at most {steps}, or train for more steps"
        yield ConfigIssue("lr_scheduler.warmup_steps", problem, fix, value=warmup)
    elif section.decay_ratio is not None and warmup + section.decay(steps) > steps:
        decay = section.decay(steps)
        problem = (
            f"a decay of {decay} steps and lr_scheduler.warmup_steps = {warmup} "
            f"do not fit into training.steps = {steps}"
        )
        fix = f"set it to at most {_round_down((steps - warmup) / steps)}, or shorten the warmup"
        yield ConfigIssue("lr_scheduler.decay_ratio", problem, fix, value=section.decay_ratio)


def _round_down(ratio: float) -> float:
    return int(ratio * 1000) / 1000


def _check_profiling(context: RunContext) -> Iterator[ConfigIssue]:
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


def _check_snapshots(context: RunContext) -> Iterator[ConfigIssue]:
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


def _check_folders(context: RunContext) -> Iterator[ConfigIssue]:
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


def _probe_folder(context: RunContext, key: str, name: str) -> list[ConfigIssue]:
    """Whether the folder is writable or could be made; creates nothing."""
    dump_folder = Path(context.config.job.dump_folder)
    if not context.full and not os.path.lexists(dump_folder):
        return []  # it will lie on another machine
    existing = dump_folder.resolve() / name
    try:
        if dump_folder.exists() and not dump_folder.is_dir():
            return []  # a problem of its own
        while not existing.exists() and existing != existing.parent:
            existing = existing.parent
    except OSError:  # a name that is too long; another one
        return []
    is_folder = existing.is_dir()
    if not is_folder:
        problem, fix = f"{existing} is not a folder", "move that file away, or use another name"
    elif not os.access(existing, os.W_OK | os.X_OK):
        problem, fix = f"{existing} is not writable", "make it writable, or use another folder"
    else:
        return []
    return [ConfigIssue(key, problem, fix, value=name, missing_asset=is_folder)]
