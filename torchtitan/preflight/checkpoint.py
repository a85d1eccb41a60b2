"""Checks of `[checkpoint]`, the run folder and the weights that a run starts from."""

import os
import re
from collections.abc import Mapping
from pathlib import Path
from typing import TYPE_CHECKING, Any

from torchtitan.checkpoint.decision import decide, starts_anew
from torchtitan.checkpoint.disk_space import free_space, space_problems
from torchtitan.checkpoint.files import TRUST_FIX, unprotected_parent
from torchtitan.checkpoint.initial import initial_path, initial_start, setting_problems
from torchtitan.checkpoint.manifest import (
    InvalidCheckpoint,
    base_of,
    read_manifest,
    tensor_differences,
)
from torchtitan.checkpoint.steps_folder import inspect_steps, unprotected_parts
from torchtitan.config.errors import ConfigError, ConfigIssue, warning
from torchtitan.config.run_context import RunContext
from torchtitan.config.schema import Checkpoint, Model
from torchtitan.handlers.registry import HANDLERS, changes_model
from torchtitan.models.decoder.args import DecoderArgs
from torchtitan.models.registry import get_family, model_args
from torchtitan.preflight.folders import check_name, check_writable
from torchtitan.preflight.model import UNKNOWN_VOCAB_SIZE
from torchtitan.utils.remote import is_remote
from torchtitan.weights.hf_config import to_hf_config
from torchtitan.weights.recognise import FOREIGN, InvalidWeights, kind_of

if TYPE_CHECKING:
    from torch import nn

_URI = re.compile(r"[A-Za-z][A-Za-z0-9+.-]*://")
_NEEDS_ENABLE = (
    "load_step",
    "initial_load_path",
    "load_only",
    "create_seed_checkpoint",
    "last_save_in_hf",
)
_LONG_RUN_STEPS = 1000
_HARMLESS_HANDLERS = {"compile", "freeze", "lora", "qlora"}
"""Handlers with which the family's parameters are loaded under their names and shapes."""


def check_static(context: RunContext) -> list[ConfigIssue]:
    """Check the section alone and against other sections; touch no file."""
    config, section = context.config, context.config.checkpoint
    issues = _path_problems("job.dump_folder", config.job.dump_folder)
    if section.initial_load_path is not None and not is_remote(section.initial_load_path):
        issues += _path_problems("checkpoint.initial_load_path", section.initial_load_path)
    issues += check_name("checkpoint.folder", section.folder)
    if section.keep_latest_k == 1:
        text = "would leave nothing to fall back to when the only checkpoint is damaged"
        fix = "use 2 or more, or 0 for all"
        issues.append(ConfigIssue("checkpoint.keep_latest_k", text, fix, 1))
    writes_weights = section.last_save_model_only or section.last_save_in_hf
    if section.export_dtype != "float32" and not writes_weights:
        text = "only applies to weights that are saved at the end, which is not set"
        fix = "set checkpoint.last_save_model_only or last_save_in_hf, or leave it at float32"
        issues.append(ConfigIssue("checkpoint.export_dtype", text, fix, section.export_dtype))
    issues += setting_problems(section) + _seed_problems(context) + _export_problems(context)
    return issues + _enable_problems(section, config.training.steps)


def _path_problems(key: str, path: str) -> list[ConfigIssue]:
    """Return issues of a path, such as `s3://...`, which would become a local folder `s3:`."""
    if not path or "\0" in path:
        return [ConfigIssue(key, "is not a path", "give the path of a folder", path)]
    if _URI.match(path):
        text = "is a URI, but runs are only read from and written to file systems"
        fix = "give a folder of a file system; checkpoint.remote_folder is for object stores"
        return [ConfigIssue(key, text, fix, path)]
    return []


def check_environment(context: RunContext) -> list[ConfigIssue]:
    """Check the run folder and a start in it; read names, config and manifests, write nothing."""
    config, section = context.config, context.config.checkpoint
    dump_folder = Path(config.job.dump_folder)
    if not context.full and not os.path.lexists(dump_folder):
        # It will lie on another machine; the weights that the run starts from may be here.
        try:
            initial_start(context)
        except ConfigError as error:
            return error.problems
        return []
    issues = check_writable("job.dump_folder", dump_folder.absolute(), str(dump_folder))
    if issues:
        return issues
    try:
        if decide(config, context, dump_folder.resolve()).action == "finished":
            return []
    except ConfigError as error:
        issues += error.problems
    if not section.enable or starts_anew(config):
        return issues
    folder = dump_folder.resolve() / section.folder
    if _is_in_memory(folder):
        text = "is in memory (tmpfs): checkpoints there are lost when the machine stops"
        issues.append(warning("job.dump_folder", text, "use a disk", str(dump_folder)))
    if not section.trust_path:
        issues += _protection_problems(folder)
    sizes = [c.manifest for c in inspect_steps(folder) if c.manifest]
    if sizes:  # a resumed run knows how large its checkpoints are
        num_bytes, num_files = sizes[-1].num_bytes, len(sizes[-1].files)
        issues += space_problems(folder, section, num_bytes, num_files, free_space(folder))
    return issues


def check_model(context: RunContext, model: "nn.Module") -> list[ConfigIssue]:
    """Compare names and shapes with those in `checkpoint.initial_load_path`, for a new run.

    Reads headers only. A vocabulary that the tokenizer decides is not compared, and nothing if
    handlers change the model, or the checkpoint holds adapters only.
    """
    config, section = context.config, context.config.checkpoint
    if not section.enable or section.initial_load_path is None:
        return []
    if is_remote(section.initial_load_path):
        return []  # it has not been downloaded for this check
    try:
        if decide(config, context, Path(config.job.dump_folder).resolve()).action != "new":
            return []
    except (ConfigError, OSError):
        return []  # reported by `check_environment`
    from torchtitan.checkpoint.dcp_io import describe_tensor
    from torchtitan.checkpoint.state import model_tensors

    key, value = "checkpoint.initial_load_path", section.initial_load_path
    try:
        if _refers_to_base(initial_path(section)):
            return []
        stored = _stored_tensors(initial_path(section), config.model)
    except InvalidCheckpoint as error:
        return [ConfigIssue(key, f"is damaged ({error})", "choose another checkpoint", value)]
    except InvalidWeights as error:
        return [ConfigIssue(key, f"cannot be loaded: {error}", "choose other weights", value)]
    if set(config.model.handlers) - _HARMLESS_HANDLERS:
        return []
    wanted = {name: describe_tensor(tensor) for name, tensor in model_tensors([model]).items()}
    # A whole checkpoint of a run with adapters has them, and maybe codes in place of matrices.
    wanted, stored = _without_adapted(wanted, stored), _without_adapted(stored, wanted)
    comparable = {name: _comparable(entry, stored.get(name)) for name, entry in wanted.items()}
    differences = tensor_differences(stored, [comparable])
    if not differences:
        return []
    fix = "choose another checkpoint, or the flavor and model.args of the run that saved it"
    return [ConfigIssue(key, f"does not fit the model: {differences}", fix, value)]


def _refers_to_base(path: Path) -> bool:
    """Return whether a step leaves out what was not trained."""
    return kind_of(path) == "step" and base_of(read_manifest(path)) is not None


def _stored_tensors(path: Path, section: Model) -> Mapping[str, dict[str, Any]]:
    """Return type and shape of the weights in a checkpoint, as in `Manifest.tensors`."""
    from torchtitan.checkpoint.model_folder import read_model_folder
    from torchtitan.weights.source import open_weights

    if kind_of(path) not in FOREIGN:
        return read_model_folder(path).tensors
    args = model_args(section)
    assert args is not None  # the model was built from them
    if args.vocab_size is None:
        args = args.model_copy(update={"vocab_size": UNKNOWN_VOCAB_SIZE})
    pads_vocabulary = "vocab_size" in section.args
    return open_weights(path, get_family(section.name), args, pads_vocabulary).tensors


def _without_adapted(
    tensors: Mapping[str, dict[str, Any]], others: Mapping[str, dict[str, Any]]
) -> dict[str, dict[str, Any]]:
    """Return `tensors` without those of linears with adapters that `others` lack."""
    both = (*tensors, *others)
    adapted = {name.removesuffix(".lora_a") for name in both if name.endswith(".lora_a")}
    return {
        name: entry
        for name, entry in tensors.items()
        if name in others or name.rpartition(".")[0] not in adapted
    }


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
    is_long = steps > _LONG_RUN_STEPS
    if section.enable:
        if section.interval <= steps or not is_long:
            return []
        text = f"is more than training.steps = {steps}: only the last step will be saved"
        fix = "set it to less, so that a stopped run can be resumed"
        return [warning("checkpoint.interval", text, fix, section.interval)]
    text = "has no effect, because checkpoint.enable is false"
    issues = [
        ConfigIssue(f"checkpoint.{key}", text, "set checkpoint.enable", getattr(section, key))
        for key in _NEEDS_ENABLE
        if getattr(section, key) != Checkpoint.model_fields[key].default
    ]
    if not issues and is_long:
        text = f"means that a run of {steps} steps cannot be resumed when it is stopped"
        return [warning("checkpoint.enable", text, "set it to true", False)]
    return issues


def _export_problems(context: RunContext) -> list[ConfigIssue]:
    """Return why the last step could not be exported: better now than after the training."""
    config, key = context.config, "checkpoint.last_save_in_hf"
    args = model_args(config.model) if config.checkpoint.last_save_in_hf else None
    if args is None:
        return []
    problem, command = "", "convert STEP OUT.pt` writes the tensors as they are"
    if config.checkpoint.load_only:
        problem = "saves nothing, because checkpoint.load_only is set"
    elif handlers := changes_model(config.model.handlers):
        problem = f"does not know what {', '.join(handlers)} changes in the model"
        if all(getattr(HANDLERS.get(name), "adds_adapters", False) for name in handlers):
            command = "export STEP OUT --merge` writes the merged model"
    elif not isinstance(args, DecoderArgs):
        problem = f"does not know the family {config.model.name}"
    else:
        try:
            to_hf_config(get_family(config.model.name), args)
        except ValueError as error:
            problem = f"cannot write the model: {error}"
    fix = f"leave it out; `torchtitan {command}"
    return [ConfigIssue(key, problem, fix, True)] if problem else []


def _seed_problems(context: RunContext) -> list[ConfigIssue]:
    section, key = context.config.checkpoint, "checkpoint.create_seed_checkpoint"
    if not section.create_seed_checkpoint:
        return []
    issues = []
    if context.world_size > 1:
        text = f"needs a single process, and there are {context.world_size}"
        fix = "start one (NGPU=1), with all degrees of [parallelism] 1"
        issues.append(ConfigIssue(key, text, fix, True))
    for name in ("load_only", "initial_load_path"):
        if getattr(section, name):
            text = f"saves initial weights, which contradicts checkpoint.{name}"
            issues.append(ConfigIssue(key, text, "leave out one of the two", True))
    return issues


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
    return [warning("job.dump_folder", text, fix, str(folder.parent))]


def _is_in_memory(folder: Path) -> bool:
    try:
        lines = Path("/proc/mounts").read_text().splitlines()
    except OSError:
        return False
    mounts = {point: kind for _, point, kind, *_ in map(str.split, lines)}
    points = (point for point in map(str, (folder, *folder.parents)) if point in mounts)
    return mounts.get(next(points, "")) in ("tmpfs", "ramfs")
