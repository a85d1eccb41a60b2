"""The start of a new run from a checkpoint of another one. No torch.

`checkpoint.initial_load_path` names a folder: a `step-N` of this library, weights that any program
saved with `torch.distributed.checkpoint`, or weights in the format of Hugging Face, Meta or GGUF.
Weights need the same model. Optimizer state, step and data position also need a manifest and the
same lanes. The path is only used while the run has no checkpoint of its own, so it happens once,
however often the job is restarted.
"""

from collections.abc import Mapping, Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Any

from torchtitan.checkpoint.config_diff import stored_value
from torchtitan.checkpoint.files import TRUST_FIX, unprotected_parent, writable_by_anybody
from torchtitan.checkpoint.manifest import (
    HANDLERS_STATE,
    MANIFEST_NAME,
    InvalidCheckpoint,
    Manifest,
    check_listing,
    read_manifest,
)
from torchtitan.checkpoint.steps_folder import step_folders, step_name
from torchtitan.config import ConfigError, ConfigIssue
from torchtitan.config.paths import hub_hint
from torchtitan.config.run_context import RunContext, default_lanes
from torchtitan.config.schema import Checkpoint
from torchtitan.config.suggest import did_you_mean
from torchtitan.utils.remote import is_remote
from torchtitan.weights.recognise import kind_of

_KEY = "checkpoint.initial_load_path"
_CONVERT_BIN = (
    'convert it: python -c "from transformers import AutoModelForCausalLM as M;'
    " M.from_pretrained('IN').save_pretrained('OUT')\""
)
_EXCLUDE_KEY = "checkpoint.exclude_from_loading"
_STATE_OF_PART = {
    "optimizer": (),
    "lr_scheduler": (),
    "dataloader": ("lane_states", "data_fingerprint", "data_summary"),
    "train_state": ("step", "num_tokens_seen"),
    "handlers": (HANDLERS_STATE,),
}
"""The parts that can be excluded, by TorchTitan's names ("handlers" is ours), and their keys in the
JSON state. Optimizer state is tensors; the learning rate is a function of the step."""


@dataclass(frozen=True)
class InitialStart:
    """The first step of a new run, its batch size and its lanes."""

    step: int
    global_batch_size: int
    num_lanes: int
    notices: tuple[str, ...] = ()


def initial_path(section: Checkpoint) -> Path:
    """Return the folder of `initial_load_path`."""
    assert section.initial_load_path is not None
    return Path(section.initial_load_path).resolve()


def without_excluded(state: Mapping[str, Any], excluded: Sequence[str]) -> dict[str, Any]:
    """Return a stored JSON state without the excluded parts."""
    dropped = {name for part in excluded for name in _STATE_OF_PART[part]}
    return {name: value for name, value in state.items() if name not in dropped}


def initial_start(context: RunContext) -> InitialStart:
    """Return where a run without checkpoints of its own begins.

    Reads names, sizes and the manifest of `initial_load_path`. Raises `ConfigError` if the run
    cannot begin from it as configured.
    """
    config, section = context.config, context.config.checkpoint
    batch, lanes = context.global_batch_size, context.num_lanes
    if not section.enable or section.initial_load_path is None:
        return InitialStart(0, batch, lanes)
    if is_remote(section.initial_load_path):  # a check that downloads no weights
        notice = f"The weights will be downloaded from {section.initial_load_path}."
        return InitialStart(0, batch, lanes, (notice,))
    path = initial_path(section)
    manifest = _inspect(section, path)
    notices = _parent_notices(section, path)
    if section.initial_load_model_only:
        return InitialStart(0, batch, lanes, (f"The weights come from {path}.", *notices))
    assert manifest is not None
    state = without_excluded(manifest.state, section.exclude_from_loading)
    step = int(state.get("step", 0))
    if step >= config.training.steps:
        text = f"{path}, from which the run continues, is already at step {step}"
        raise ConfigError(
            ConfigIssue(
                "training.steps", text, f"set it to more than {step}", config.training.steps
            )
        )
    stored = manifest.info.get("config")
    if config.training.global_batch_size <= 0 and isinstance(stored, Mapping):
        batch = stored_value(stored, "training.global_batch_size") or batch
    lanes = config.data.lanes or default_lanes(batch)
    lane_states = state.get("lane_states")
    if lane_states:
        lanes = len(lane_states)
        if config.data.lanes not in (None, lanes):
            text = f"is {lanes} in {path}, from whose data positions the run continues"
            fix = 'leave it unset, or add "dataloader" to checkpoint.exclude_from_loading'
            raise ConfigError(ConfigIssue("data.lanes", text, fix, config.data.lanes))
    notice = f"The run continues from step {step} of {path}."
    return InitialStart(step, batch, lanes, (notice, *notices))


def _parent_notices(section: Checkpoint, path: Path) -> list[str]:
    parent = None if section.trust_path else unprotected_parent(path)
    return (
        []
        if parent is None
        else [f"All users may replace that folder, because {parent} is writable by them."]
    )


def setting_problems(section: Checkpoint) -> list[ConfigIssue]:
    """Return contradictions between the settings of the start. Touches no file."""
    excluded = list(section.exclude_from_loading)
    text = "is not a part that can be excluded"
    problems = [
        ConfigIssue(_EXCLUDE_KEY, text, did_you_mean(name, _STATE_OF_PART), name)
        for name in excluded
        if name not in _STATE_OF_PART
    ]
    if problems or not excluded:
        return problems
    if section.initial_load_path is None or section.initial_load_model_only:
        text = "only applies to a new run that takes over more than weights; a run always loads its"
        text += " own checkpoints whole"
        fix = "remove it; or start in another --job.dump_folder, with checkpoint.initial_load_path"
        fix += " and checkpoint.initial_load_model_only = false"
        return [ConfigIssue(_EXCLUDE_KEY, text, fix, excluded)]
    if ("lr_scheduler" in excluded) != ("train_state" in excluded):
        text = "the learning rate follows from the step, so neither can be excluded alone"
        fix = 'name both "lr_scheduler" and "train_state", or none of them'
        return [ConfigIssue(_EXCLUDE_KEY, text, fix, excluded)]
    if "optimizer" in excluded and "lr_scheduler" not in excluded:
        text = "moments that start at zero need another warmup of the learning rate"
        fix = 'add "lr_scheduler" and "train_state"'
        return [ConfigIssue(_EXCLUDE_KEY, text, fix, excluded)]
    return []


def _inspect(section: Checkpoint, path: Path) -> Manifest | None:
    """Return the manifest of a usable folder; None if it only holds weights."""

    def refuse(text: str, fix: str, **more: Any) -> ConfigError:
        return ConfigError(ConfigIssue(_KEY, text, fix, section.initial_load_path, **more))

    whole = "name a checkpoint, such as .../checkpoint/step-1000 or a Hugging Face folder"
    if not path.exists():
        hint = hub_hint(section.initial_load_path or "")
        raise refuse("does not exist", hint + whole, missing_asset=True)
    kind = kind_of(path)
    if kind == "torch":
        if path.is_file():
            fix = f"convert it: torchtitan convert {path} OUT --format dcp"
            raise refuse("is a file of torch.save, which is not loaded directly", fix)
        raise refuse("holds weights of torch.save (.bin, .pt) only", _CONVERT_BIN)
    if kind is None:
        steps = step_folders(path) if path.is_dir() else []
        if steps:
            raise refuse(
                f"is no checkpoint, but holds steps {', '.join(map(str, steps))}",
                f"choose one, such as {path / step_name(steps[-1])}",
            )
        text = "is no checkpoint: neither torch.distributed.checkpoint's (.metadata), nor a folder"
        raise refuse(f"{text} of Hugging Face's or Meta's, nor GGUF", whole)
    for part in [] if section.trust_path else [path, path / MANIFEST_NAME]:
        if part.exists() and writable_by_anybody(part):
            name = "" if part == path else f"its {part.name} "
            raise refuse(f"{name}is writable by all users, who could plant a checkpoint", TRUST_FIX)
    manifest = None
    if kind == "step":
        try:
            manifest = read_manifest(path)
            check_listing(path, manifest)
        except InvalidCheckpoint as error:
            raise refuse(f"is damaged ({error})", "choose another checkpoint") from error
    if not section.initial_load_model_only and (manifest is None or manifest.model_only):
        text = f"is not possible from {path}, which holds only a model"
        fix = "set it to true, or choose a checkpoint with optimizer state"
        raise ConfigError(ConfigIssue("checkpoint.initial_load_model_only", text, fix, False))
    return manifest
