"""Open any checkpoint as a model that is ready to run, alone or on a mesh, without training.

In two phases: `describe_pretrained` reads names and sizes, so that whatever is wrong with a command
line is reported at once; `load_pretrained` builds the model and fills each rank's part.
"""

import os
from dataclasses import dataclass
from functools import partial
from pathlib import Path

import torch
from pydantic import ValidationError
from torch import nn
from torch.distributed.device_mesh import DeviceMesh

from torchtitan.checkpoint.initial_load import InitialLoad
from torchtitan.checkpoint.manifest import MANIFEST_NAME, InvalidCheckpoint, read_manifest
from torchtitan.checkpoint.state import model_tensors
from torchtitan.checkpoint.steps_folder import inspect_steps, step_name
from torchtitan.config import CheckpointError, ConfigError, ConfigIssue, JobConfig
from torchtitan.config.custom_import import import_custom_modules
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
from torchtitan.utils.dtypes import default_dtype
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
    """Where the tokenizer's files are, and what belongs to the model: templates, end tokens."""
    config: JobConfig | None = None
    """The config of the run that saved it; None for weights from elsewhere."""
    notices: tuple[str, ...] = ()

    @property
    def eos_ids(self) -> frozenset[int]:
        """The tokens that end a text, by the tokenizer and by the files next to the weights."""
        found = {self.tokenizer.eos_id}
        for file in (folder / name for folder in self.folders for name in _GENERATION_FILES):
            ids = read_json(file).get("eos_token_id")
            ids = ids if isinstance(ids, list) else [ids]
            found |= {token for token in ids if isinstance(token, int)}
        return frozenset(found)


def describe_pretrained(path: str, tokenizer_path: str | None = None) -> Pretrained:
    """Return what `path` holds: a step, a run's folder (its newest step), or foreign weights.

    `tokenizer_path` replaces the checkpoint's tokenizer. Raises ConfigError.
    """
    folder = Path(path).resolve()
    if not folder.exists():
        raise ConfigError(ConfigIssue(_KEY, "does not exist", "name a folder or a file", path))
    notices: tuple[str, ...] = ()
    if (step := newest_step(folder)) is not None:
        folder, notices = step, (f"The newest step of {path} is {step.name}.",)
    if os.path.lexists(folder / MANIFEST_NAME):
        return _describe_step(folder, tokenizer_path, notices)
    return _describe_foreign(folder, tokenizer_path)


def newest_step(folder: Path) -> Path | None:
    """Return the newest valid step of a run's folder, or of its folder of checkpoints."""
    for parent in (folder, folder / "checkpoint"):
        valid = [found.step for found in inspect_steps(parent) if found.manifest is not None]
        if valid:
            return parent / step_name(valid[-1])
    return None


def _describe_step(
    folder: Path, tokenizer_path: str | None, notices: tuple[str, ...]
) -> Pretrained:
    try:
        stored = read_manifest(folder).info.get("config")
    except InvalidCheckpoint as error:
        raise CheckpointError(str(error)) from error
    try:
        config = JobConfig.model_validate(stored)
    except ValidationError as error:
        raise ConfigError(problems_of(error, {})) from None
    if problems := import_custom_modules(config):
        raise ConfigError(problems)
    where = tokenizer_path or config.model.tokenizer_path
    tokenizer = build_tokenizer(where)
    family = get_family(config.model.name)
    args = family.resolve(config.model, tokenizer.vocab_size)
    if "flex_attention" in config.model.handlers:
        _require_usual_masks(config)
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
    args = family.args_type(**description.args)
    if args.vocab_size is not None and args.vocab_size < tokenizer.vocab_size:
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
    if "flex_attention" in config.model.handlers:
        _require_usual_masks(config)


def _require_usual_masks(config: JobConfig) -> None:
    """Raise ConfigError for masks that a cache of keys and values does not know."""
    masks = handler_settings(config, "flex_attention").masks
    if others := [name for name in masks if name not in (CAUSAL, DOCUMENT, WINDOW)]:
        problem = f"was trained with the masks {', '.join(others)}, which have no cache"
        raise ConfigError(ConfigIssue(_KEY, problem, "measure it with [validation] instead"))


def load_pretrained(
    found: Pretrained,
    world: DistributedContext,
    mesh: DeviceMesh,
    dims: ParallelDims,
    dtype: torch.dtype,
) -> nn.Module:
    """Return the model in evaluation mode, its weights of `dtype` loaded and verified.

    `dims` has tensor parallelism, FSDP and copies only. All ranks must call it. Raises
    CheckpointError for damage, and for weights that do not fit the hyper-parameters.
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
    model.requires_grad_(False)
    parallelize_for_inference(
        model, mesh, dims, dtype, [handler.extend_tp_plan for handler in handlers]
    )
    model.to_empty(device=world.device)
    _load(found, world, model)
    for handler in handlers:
        handler.after_load(model)
    return model.eval()


def _load(found: Pretrained, world: DistributedContext, model: nn.Module) -> None:
    from torchtitan.weights.source import open_weights

    section = Checkpoint(initial_load_path=str(found.path), initial_load_model_only=True)
    open_foreign = partial(open_weights, family=found.family, args=found.args)
    InitialLoad(section, world, open_foreign).load(model_tensors([model]), {})
