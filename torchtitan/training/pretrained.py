"""Open any checkpoint as a model that is ready to run, alone or on a mesh, without training.

In two phases: `describe_pretrained` reads names and sizes, so that whatever is wrong with a command
line is reported at once; `load_pretrained` builds the model and fills each rank's part.
"""

import os
from collections.abc import Iterator
from contextlib import contextmanager
from dataclasses import dataclass, replace
from functools import partial
from pathlib import Path

import torch
from pydantic import ValidationError
from torch import nn
from torch.distributed.device_mesh import DeviceMesh

from torchtitan.checkpoint.base_place import NOT_MOVED, MovedBase, missing_base, place_of_base
from torchtitan.checkpoint.config_diff import read_stored_config, stored_value
from torchtitan.checkpoint.initial_load import InitialLoad
from torchtitan.checkpoint.manifest import (
    MANIFEST_NAME,
    InvalidCheckpoint,
    base_of,
    read_manifest,
)
from torchtitan.checkpoint.state import model_tensors, non_finite_tensors
from torchtitan.checkpoint.steps_folder import Candidate, inspect_steps, step_name
from torchtitan.checkpoint.stored_run import CONFIG_NAME
from torchtitan.config import (
    CheckpointError,
    ConfigError,
    ConfigIssue,
    JobConfig,
    NonFiniteError,
)
from torchtitan.config.custom_import import require_imported
from torchtitan.config.paths import hub_hint
from torchtitan.config.schema import Checkpoint
from torchtitan.config.value_errors import problems_of
from torchtitan.data.tokenizers import Tokenizer, build_tokenizer
from torchtitan.distributed.context import DistributedContext
from torchtitan.distributed.parallel_dims import ParallelDims
from torchtitan.handlers.conversion import convert_model
from torchtitan.handlers.masks import CAUSAL, DOCUMENT, WINDOW
from torchtitan.handlers.named import NamedHandler
from torchtitan.handlers.registry import TRAINING_ONLY, changes_model, handler_settings
from torchtitan.models.family import ModelFamily, require_language_model
from torchtitan.models.registry import get_family
from torchtitan.models.spec import ModelArgs
from torchtitan.parallel.parallelize import parallelize_for_inference
from torchtitan.training.pretrained_config import tokenizer_of
from torchtitan.utils.dtypes import default_dtype
from torchtitan.utils.remote import is_remote
from torchtitan.utils.text import some_of
from torchtitan.weights.description import KEY as INITIAL_LOAD_KEY
from torchtitan.weights.recognise import kind_of
from torchtitan.weights.remote import download
from torchtitan.weights.tokenizer_files import folder_of_tokenizer, read_json

_KEY = "CHECKPOINT"
_GENERATION_FILES = ("generation_config.json", "config.json")


@dataclass(frozen=True)
class Pretrained:
    """A checkpoint that has been looked at, not loaded."""

    path: Path
    family: ModelFamily
    args: ModelArgs
    tokenizer: Tokenizer
    folders: tuple[Path, ...]
    """Folders of the tokenizer's files and of the model's: templates, end tokens."""
    config: JobConfig | None = None
    """The config of the run that saved it; None for weights from elsewhere."""
    notices: tuple[str, ...] = ()
    moved: MovedBase = NOT_MOVED
    """The place of the base that a step of adapters refers to, if it has moved."""

    @property
    def eos_ids(self) -> frozenset[int]:
        """The tokens that end a text, by the tokenizer and by the files next to the weights."""
        found = {self.tokenizer.eos_id}
        for file in (folder / name for folder in self.folders for name in _GENERATION_FILES):
            ids = read_json(file).get("eos_token_id")
            ids = ids if isinstance(ids, list) else [ids]
            found |= {token for token in ids if isinstance(token, int)}
        return frozenset(found)


def describe_pretrained(
    path: str, tokenizer_path: str | None = None, moved: MovedBase = NOT_MOVED
) -> Pretrained:
    """Return what `path` holds: a step, a run's folder (its newest step), or foreign weights.

    `tokenizer_path` replaces the checkpoint's tokenizer; the base of adapters may have `moved`.
    Raises ConfigError, and CheckpointError for a base that is gone.
    """
    folder, damaged = find_checkpoint(path)
    notices = tuple(f"A step is damaged, and not used: {fault}" for fault in damaged)
    if os.path.lexists(folder / MANIFEST_NAME):
        if folder != Path(path).resolve():
            notices += (f"The newest step of {path} is {folder.name}.",)
        return replace(_describe_step(folder, tokenizer_path, notices, moved), moved=moved)
    with under_command_key():
        return _describe_foreign(folder, tokenizer_path)


def find_checkpoint(given: str) -> tuple[Path, list[str]]:
    """Return the checkpoint that a command line names, and what is wrong with others of its run.

    Of a run's folder it is the newest step; `hf://owner/name` is downloaded first. Raises
    ConfigError, and CheckpointError if all steps are damaged.
    """
    if is_remote(given):
        with under_command_key():
            return download(given), []
    path = Path(given).resolve()
    if not path.exists():
        fix = f"{hub_hint(given)}name a folder or a file"
        raise ConfigError(ConfigIssue(_KEY, "does not exist", fix, given))
    if (step := newest_step(path)) is not None:
        return step, damaged_steps(path)
    kind = kind_of(path)
    if kind in ("torch", None) and path.is_file() and kind_of(path.parent) not in ("torch", None):
        text = "is one file of a checkpoint"
        raise ConfigError(ConfigIssue(_KEY, text, f"name its folder, {path.parent}", given))
    if kind == "torch":
        text = "holds weights of torch.save only, which may run code"
        fix = "load it with transformers and save it with save_pretrained, which writes safetensors"
        raise ConfigError(ConfigIssue(_KEY, text, fix, given))
    if kind is None:
        text = "is no checkpoint, and holds none"
        fix = "name a step, a run's folder, Hugging Face's or Meta's folder, or a GGUF file"
        raise ConfigError(ConfigIssue(_KEY, text, fix, given))
    return path, []


@contextmanager
def under_command_key() -> Iterator[None]:
    """Report issues of `checkpoint.initial_load_path` as those of the command's argument."""
    try:
        yield
    except ConfigError as error:
        raise ConfigError(
            [replace(p, key=_KEY) if p.key == INITIAL_LOAD_KEY else p for p in error.problems]
        ) from None


def newest_step(folder: Path) -> Path | None:
    """Return the newest valid step of a run's folder, or of its folder of checkpoints.

    None if there are no steps. Raises CheckpointError if all are damaged.
    """
    parent, steps = _steps_of(folder)
    valid = [found.step for found in steps if found.manifest is not None]
    if steps and not valid:
        raise CheckpointError("; ".join(damaged_steps(folder)))
    return parent / step_name(valid[-1]) if valid else None


def damaged_steps(folder: Path) -> list[str]:
    """Return what is wrong with each step, in the same places, that is not valid."""
    return [found.fault for found in _steps_of(folder)[1] if found.fault is not None]


def _steps_of(folder: Path) -> tuple[Path, list[Candidate]]:
    name = stored_value(read_stored_config(folder / CONFIG_NAME) or {}, "checkpoint.folder")
    if steps := inspect_steps(folder):
        return folder, steps
    checkpoints = folder / (name or Checkpoint().folder)
    return checkpoints, inspect_steps(checkpoints)


def _describe_step(
    folder: Path, tokenizer_path: str | None, notices: tuple[str, ...], moved: MovedBase
) -> Pretrained:
    try:
        manifest = read_manifest(folder)
    except InvalidCheckpoint as error:
        raise CheckpointError(str(error)) from error
    recorded = base_of(manifest)
    if recorded is not None and place_of_base(recorded, moved) is None:
        raise missing_base(recorded, moved)
    try:
        config = JobConfig.model_validate(manifest.info.get("config"))
    except ValidationError as error:
        raise ConfigError(problems_of(error, {})) from None
    require_imported(config)
    where = tokenizer_path or tokenizer_of(folder) or config.model.tokenizer_path
    tokenizer = build_tokenizer(where)
    family = get_family(config.model.name)
    args = family.resolve(config.model, tokenizer.vocab_size)
    require_cached_masks(config)
    return Pretrained(
        folder, family, args, tokenizer, (folder_of_tokenizer(where),), config, notices
    )


def _describe_foreign(path: Path, tokenizer_path: str | None) -> Pretrained:
    from torchtitan.weights.description import describe_model

    description = describe_model(path)
    around = path if path.is_dir() else path.parent
    where = tokenizer_path or str(around)
    tokenizer = build_tokenizer(where)
    family = get_family(description.family)
    args = description.resolved()
    if args.vocab_size is None:  # Meta's files may leave it to the tokenizer
        args = args.model_copy(update={"vocab_size": tokenizer.vocab_size})
    elif args.vocab_size < tokenizer.vocab_size:
        problem = f"has {tokenizer.vocab_size} tokens, but the model only {args.vocab_size}"
        fix = "name the model's own tokenizer with --tokenizer"
        raise ConfigError(ConfigIssue("the tokenizer", problem, fix, where))
    folders = tuple(dict.fromkeys((folder_of_tokenizer(where), around)))
    return Pretrained(
        path, family, args, tokenizer, folders, notices=tuple(map(str, description.notices))
    )


def require_plain_model(config: JobConfig) -> None:
    """Raise ConfigError for handlers that change what the family's model computes."""
    if changing := changes_model(config.model.handlers):
        problem = f"was trained with {', '.join(changing)}, which other programs lack"
        fix = "convert it to a .pt file instead, which holds its tensors as they are"
        raise ConfigError(ConfigIssue("model.handlers", problem, fix))
    require_cached_masks(config)


def require_cached_masks(config: JobConfig) -> None:
    """Raise ConfigError for masks that a cache of keys and values does not know."""
    if masks := masks_without_cache(config):
        problem = f"was trained with the masks {', '.join(masks)}, which have no cache"
        raise ConfigError(ConfigIssue(_KEY, problem, "measure it with [validation] instead"))


def masks_without_cache(config: JobConfig) -> list[str]:
    """Return the masks of the model that a cache of keys and values does not know."""
    if "flex_attention" not in config.model.handlers:
        return []
    masks = handler_settings(config, "flex_attention").masks
    return [name for name in masks if name not in (CAUSAL, DOCUMENT, WINDOW)]


def load_pretrained(
    found: Pretrained,
    world: DistributedContext,
    mesh: DeviceMesh,
    dims: ParallelDims,
    dtype: torch.dtype,
) -> nn.Module:
    """Return the model in evaluation mode, its weights of `dtype` loaded and verified.

    `dims` has tensor parallelism, FSDP and copies only. All ranks must call it.

    Raises:
        CheckpointError: it is damaged, or does not fit the hyper-parameters.
        NonFiniteError: a weight is NaN or infinite, or beyond the range of `dtype`.
    """
    assert dims.pp == dims.cp == 1
    with torch.device("meta"), default_dtype(dtype):
        model = found.family.build(found.args)
    require_language_model(model, found.family.name)
    handlers: list[NamedHandler] = []
    if found.config is not None:
        names = [name for name in found.config.model.handlers if name not in TRAINING_ONLY]
        handlers = [NamedHandler(name, found.config, dims) for name in names]
        convert_model(model, handlers, dtype)
        model.to(dtype)  # a handler may keep what it freezes in a type of its own
    model.requires_grad_(False)
    parallelize_for_inference(
        model, mesh, dims, dtype, [handler.extend_tp_plan for handler in handlers]
    )
    model.to_empty(device=world.device)
    _load(found, world, model, handlers)
    if names := non_finite_tensors(world, model_tensors([model]), [model]):
        which = f"these hold NaN or infinity in {dtype}: {some_of(names)}"
        raise NonFiniteError(f"{found.path} cannot be used: {which}")
    for handler in handlers:
        handler.after_load(model)
    return model.eval()


def _load(
    found: Pretrained, world: DistributedContext, model: nn.Module, handlers: list[NamedHandler]
) -> None:
    from torchtitan.weights.source import open_weights

    section = Checkpoint(initial_load_path=str(found.path), initial_load_model_only=True)
    open_foreign = partial(open_weights, family=found.family, args=found.args)
    load = InitialLoad(section, world, open_foreign, found.moved)
    load.load(model_tensors([model]), {}, handlers)
