"""Checks of `[checkpoint]`, the run folder and the weights that a run starts from."""

import os
import re
from pathlib import Path
from typing import TYPE_CHECKING, Any

from torchtitan.checkpoint.decision import decide, starts_anew
from torchtitan.checkpoint.disk_space import free_space, space_problems
from torchtitan.checkpoint.files import TRUST_FIX, unprotected_parent
from torchtitan.checkpoint.initial import initial_path, setting_problems
from torchtitan.checkpoint.manifest import InvalidCheckpoint, tensor_differences
from torchtitan.checkpoint.steps_folder import inspect_steps, unprotected_parts
from torchtitan.config import ConfigError, ConfigIssue
from torchtitan.config.run_context import RunContext
from torchtitan.config.schema import Checkpoint
from torchtitan.preflight.model import UNKNOWN_VOCAB_SIZE
from torchtitan.weights.hub import is_hub_path

if TYPE_CHECKING:
    from torch import nn

_NAME = re.compile(r"(?!\.)[A-Za-z0-9._-]{1,128}", re.ASCII)
_TAKEN = re.compile(
    r"config\.toml|run_status\.json|tokenizer|metrics(\.jsonl(\.damaged-[0-9]+)?)?|wandb|previous-[0-9]+"
)
_URI = re.compile(r"[A-Za-z][A-Za-z0-9+.-]*://")
_LONG_RUN_STEPS = 1000
_HARMLESS_HANDLERS = {"compile"}
"""Handlers that add no parameters."""


def check_static(context: RunContext) -> list[ConfigIssue]:
    """Check the section alone and against other sections; touch no file."""
    config, section = context.config, context.config.checkpoint
    problems = _path_problems("job.dump_folder", config.job.dump_folder)
    if section.initial_load_path is not None and not is_hub_path(section.initial_load_path):
        problems += _path_problems("checkpoint.initial_load_path", section.initial_load_path)
    if not _NAME.fullmatch(section.folder) or ".." in section.folder:
        text = "is not a plain name: letters, digits, `.`, `_`, `-`, no leading dot, no `..`"
        fix = 'use a name such as "checkpoint"; job.dump_folder says where it lies'
        problems.append(ConfigIssue("checkpoint.folder", text, fix, section.folder))
    if _TAKEN.fullmatch(section.folder):
        text = "is the name of something else in the run folder"
        fix = 'choose another name, such as "checkpoint"'
        problems.append(ConfigIssue("checkpoint.folder", text, fix, section.folder))
    if section.keep_latest_k == 1:
        text = "would leave nothing to fall back to when the only checkpoint is damaged"
        problems.append(
            ConfigIssue("checkpoint.keep_latest_k", text, "use 2 or more, or 0 for all", 1)
        )
    if section.export_dtype != "float32" and not section.last_save_model_only:
        text = "only applies to a last checkpoint without optimizer state, which is not set"
        fix = 'set checkpoint.last_save_model_only, or leave it at "float32"'
        problems.append(ConfigIssue("checkpoint.export_dtype", text, fix, section.export_dtype))
    problems += setting_problems(section) + _seed_problems(context)
    return problems + _enable_problems(section, config.training.steps)


def _path_problems(key: str, path: str) -> list[ConfigIssue]:
    """Return problems of a path, such as `s3://...`, which would become a local folder `s3:`."""
    if not path or "\0" in path:
        return [ConfigIssue(key, "is not a path", "give the path of a folder", path)]
    if _URI.match(path):
        text = "is a URI, but runs are only read from and written to file systems"
        fix = "mount that storage, and give the path of a folder in it"
        return [ConfigIssue(key, text, fix, path)]
    return []


def check_environment(context: RunContext) -> list[ConfigIssue]:
    """Check the run folder and a start in it; read names, config and manifests, write nothing."""
    config, section = context.config, context.config.checkpoint
    dump_folder = Path(config.job.dump_folder)
    if not context.full and not os.path.lexists(dump_folder):
        return []  # it will lie on another machine
    problems = _folder_problems(dump_folder)
    if problems:
        return problems
    try:
        if decide(config, context, dump_folder.resolve()).action == "finished":
            return []
    except ConfigError as error:
        problems += error.problems
    if not section.enable or starts_anew(config):
        return problems
    folder = dump_folder.resolve() / section.folder
    if _is_in_memory(folder):
        text = "is in memory (tmpfs): checkpoints there are lost when the machine stops"
        problems.append(_warning("job.dump_folder", text, "use a disk", str(dump_folder)))
    if not section.trust_path:
        problems += _protection_problems(folder)
    sizes = [c.manifest for c in inspect_steps(folder) if c.manifest]
    if sizes:  # a resumed run knows how large its checkpoints are
        num_bytes, num_files = sizes[-1].num_bytes, len(sizes[-1].files)
        problems += space_problems(folder, section, num_bytes, num_files, free_space(folder))
    return problems


def check_model(context: RunContext, model: "nn.Module") -> list[ConfigIssue]:
    """Compare names and shapes with those in `checkpoint.initial_load_path`, for a new run.

    A vocabulary that the tokenizer decides is not compared.
    """
    config, section = context.config, context.config.checkpoint
    if not section.enable or section.initial_load_path is None:
        return []
    if is_hub_path(section.initial_load_path):
        return []  # it has not been downloaded for this check
    if set(config.model.handlers) - _HARMLESS_HANDLERS:
        return []
    try:
        if decide(config, context, Path(config.job.dump_folder).resolve()).action != "new":
            return []
    except (ConfigError, OSError):
        return []  # reported by `check_environment`
    from torchtitan.checkpoint.dcp_io import describe_tensor
    from torchtitan.checkpoint.model_folder import read_model_folder
    from torchtitan.checkpoint.state import model_tensors

    key, value = "checkpoint.initial_load_path", section.initial_load_path
    try:
        stored = read_model_folder(initial_path(section)).tensors
    except InvalidCheckpoint as error:
        return [ConfigIssue(key, f"is damaged ({error})", "choose another checkpoint", value)]
    wanted = {name: describe_tensor(tensor) for name, tensor in model_tensors([model]).items()}
    comparable = {name: _comparable(entry, stored.get(name)) for name, entry in wanted.items()}
    differences = tensor_differences(stored, [comparable])
    if not differences:
        return []
    fix = "choose another checkpoint, or the flavor and model.args of the run that saved it"
    return [ConfigIssue(key, f"does not fit the model: {differences}", fix, value)]


def _comparable(wanted: dict[str, Any], stored: dict[str, Any] | None) -> dict[str, Any]:
    """Return `wanted` with the stored number format, which a load converts, and vocabulary."""
    if stored is None or len(stored["shape"]) != len(wanted["shape"]):
        return wanted
    shape = [
        known if size == UNKNOWN_VOCAB_SIZE else size
        for size, known in zip(wanted["shape"], stored["shape"])
    ]
    return {"dtype": stored["dtype"], "shape": shape}


def _enable_problems(section: Checkpoint, steps: int) -> list[ConfigIssue]:
    if section.enable:
        if section.interval <= steps or steps <= _LONG_RUN_STEPS:
            return []
        text = f"is more than training.steps = {steps}: only the last step will be saved"
        fix = "set it to less, so that a stopped run can be resumed"
        return [_warning("checkpoint.interval", text, fix, section.interval)]
    asked = {
        "load_step": section.load_step >= 0,
        "initial_load_path": section.initial_load_path is not None,
        "load_only": section.load_only,
        "create_seed_checkpoint": section.create_seed_checkpoint,
    }
    text = "has no effect, because checkpoint.enable is false"
    problems = [
        ConfigIssue(f"checkpoint.{key}", text, "set checkpoint.enable", getattr(section, key))
        for key, is_set in asked.items()
        if is_set
    ]
    if not problems and steps > _LONG_RUN_STEPS:
        text = f"means that a run of {steps} steps cannot be resumed when it is stopped"
        return [_warning("checkpoint.enable", text, "set it to true", False)]
    return problems


def _seed_problems(context: RunContext) -> list[ConfigIssue]:
    section, key = context.config.checkpoint, "checkpoint.create_seed_checkpoint"
    if not section.create_seed_checkpoint:
        return []
    problems = []
    if context.world_size > 1:
        text = f"needs a single process, and there are {context.world_size}"
        fix = "start one (NGPU=1), with all degrees of [parallelism] 1"
        problems.append(ConfigIssue(key, text, fix, True))
    for name in ("load_only", "initial_load_path"):
        if getattr(section, name):
            text = f"saves initial weights, which contradicts checkpoint.{name}"
            problems.append(ConfigIssue(key, text, "leave out one of the two", True))
    return problems


def _folder_problems(folder: Path) -> list[ConfigIssue]:
    key, whole = "job.dump_folder", folder.absolute()
    try:
        existing = next(path for path in (whole, *whole.parents) if path.exists())
    except OSError as error:
        text = f"cannot be used: {error.strerror or error}"
        return [ConfigIssue(key, text, "choose another path", str(folder))]
    fix = "choose a folder that this user may write to"
    if not existing.is_dir():
        text = f"{existing} is a file" if existing != whole else "is a file"
        return [ConfigIssue(key, text, fix, str(folder))]
    if not os.access(existing, os.W_OK | os.X_OK):
        text = f"cannot be written: no permission for {existing}"
        return [ConfigIssue(key, text, fix, str(folder), missing_asset=True)]
    return []


def _protection_problems(folder: Path) -> list[ConfigIssue]:
    text = "is writable by all users of this machine, who could plant a checkpoint"
    parts = unprotected_parts(folder)
    if parts:
        return [ConfigIssue("checkpoint.folder", text, TRUST_FIX, str(part)) for part in parts]
    parent = unprotected_parent(folder.parent)
    if parent is None:
        return []
    text = f"lies below {parent}, where all users of this machine may replace it"
    fix = f"`chmod o-w {parent}` (or +t), or set checkpoint.trust_path"
    return [_warning("job.dump_folder", text, fix, str(folder.parent))]


def _is_in_memory(folder: Path) -> bool:
    try:
        lines = Path("/proc/mounts").read_text().splitlines()
    except OSError:
        return False
    mounts = {point: kind for _, point, kind, *_ in map(str.split, lines)}
    points = (point for point in map(str, (folder, *folder.parents)) if point in mounts)
    return mounts.get(next(points, "")) in ("tmpfs", "ramfs")


def _warning(key: str, text: str, fix: str, value: object) -> ConfigIssue:
    return ConfigIssue(key, text, fix, value, severity="warning")
