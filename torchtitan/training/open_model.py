"""Open a checkpoint of any kind to export or convert it, verified as far as its files allow."""

import logging
from pathlib import Path
from typing import Any

import torch
from pydantic import ValidationError

from torchtitan.checkpoint.config_diff import stored_value
from torchtitan.checkpoint.dcp_io import quiet_dcp
from torchtitan.checkpoint.manifest import InvalidCheckpoint, Manifest, base_of, verify_file
from torchtitan.checkpoint.model_folder import read_model_folder
from torchtitan.config import CheckpointError, ConfigError, ConfigIssue, JobConfig
from torchtitan.config.custom_import import require_imported
from torchtitan.config.value_errors import problems_of
from torchtitan.handlers.registry import HANDLERS, handler_settings
from torchtitan.models.decoder.args import DecoderArgs
from torchtitan.models.family import ModelFamily
from torchtitan.models.registry import get_family
from torchtitan.models.spec import ModelArgs
from torchtitan.training.pretrained import newest_step, require_plain_model
from torchtitan.training.pretrained_config import tokenizer_of_step
from torchtitan.weights.description import describe_model
from torchtitan.weights.recognise import InvalidWeights, kind_of
from torchtitan.weights.source import WeightSource, open_weights
from torchtitan.weights.stored_model import StoredModel, Weights
from torchtitan.weights.tokenizer_files import tokenizer_folder
from torchtitan.weights.torch_file import TorchFile

logger = logging.getLogger(__name__)

_IN = "IN"
_EMBEDDING, _HEAD = "tok_embeddings.weight", "output.weight"


def open_model(
    path: Path, tokenizer_path: str | None = None, choice: str | None = None
) -> StoredModel:
    """Return the model of a checkpoint of any kind, its files verified as far as they allow it.

    `choice`: `FAMILY/FLAVOR`, for weights that come without hyper-parameters. Raises ConfigError,
    and CheckpointError for damage.
    """
    path = newest_step(path) or path
    kind = kind_of(path) if path.exists() else None
    if kind is None:
        text = "is no checkpoint" if path.exists() else "does not exist"
        fix = "name a step, a run's folder, a Hugging Face folder, Meta's, a GGUF or a .pt file"
        raise ConfigError(ConfigIssue(_IN, text, fix, str(path)))
    quiet_dcp()
    try:
        if kind == "step":
            return _open_step(path, tokenizer_path)
        if kind in ("dcp", "torch"):
            weights: Weights = read_model_folder(path) if kind == "dcp" else TorchFile(_only(path))
            family, args = _chosen(path, choice, weights)
            return StoredModel(path, family, args, weights, tokenizer_path)
        description = describe_model(path)
        family = get_family(description.family)
        args = decoder_args(family, description.resolved())
        source = open_weights(path, family, args)
        args = _with_vocabulary(args, source)
        if kind == "meta" and not args.tied_embeddings and _is_tied(source):
            args = args.model_copy(update={"tied_embeddings": True})
            source = open_weights(path, family, args)
        for notice in description.notices:
            logger.info(notice)
        found = tokenizer_folder(path)
        tokenizer = tokenizer_path or (None if found is None else str(found))
        return StoredModel(path, family, args, source, tokenizer)
    except (InvalidWeights, InvalidCheckpoint) as error:
        raise CheckpointError(str(error)) from error


def _open_step(path: Path, tokenizer_path: str | None) -> StoredModel:
    folder = read_model_folder(path)
    manifest = folder.manifest
    assert manifest is not None
    verify_files(path, manifest)
    config = config_of_step(manifest)
    if holds_adapters(manifest):
        text = "holds adapters apart from their base"
        fix = "merge them with --merge, or write them alone with --adapter (torchtitan export)"
        raise ConfigError(ConfigIssue(_IN, text, fix, str(path)))
    require_plain_model(config)
    family = get_family(config.model.name)
    rows = folder.tensors.get(_EMBEDDING, {}).get("shape", [None])[0]
    args = decoder_args(family, family.resolve(config.model, rows))
    args = with_window(config, args)
    tokenizer = tokenizer_path or tokenizer_of_step(path)
    return StoredModel(path, family, args, folder, tokenizer, record_of_training(manifest))


def holds_adapters(manifest: Manifest | None) -> bool:
    """Return whether a step is of a run that trains adapters, with or without their base."""
    config = None if manifest is None else manifest.info.get("config")
    entries = [HANDLERS.get(name) for name in stored_value(config or {}, "model.handlers") or ()]
    return base_of(manifest) is not None or any(e is not None and e.adds_adapters for e in entries)


def config_of_step(manifest: Manifest) -> JobConfig:
    """Return the config of the run that saved a step; the user has imported its modules."""
    try:
        config = JobConfig.model_validate(manifest.info.get("config"))
    except ValidationError as error:
        raise ConfigError(problems_of(error, {})) from None
    require_imported(config)
    return config


def with_window(config: JobConfig, args: DecoderArgs) -> DecoderArgs:
    """Return `args` with the window of attention that a handler may have set."""
    if "flex_attention" not in config.model.handlers:
        return args
    masks = handler_settings(config, "flex_attention")
    return args.model_copy(update={"sliding_window": masks.chosen_window(args.sliding_window)})


def record_of_training(manifest: Manifest) -> dict[str, Any]:
    """Return `StoredModel.training` of a step."""
    info = {key: manifest.info.get(key) for key in ("config", "versions")}
    return {"step": manifest.step, "state": manifest.state, **info}


def verify_files(path: Path, manifest: Manifest) -> None:
    """Raise `InvalidCheckpoint` for a file of a step that is not what was written."""
    for number, (name, record) in enumerate(manifest.files.items(), start=1):
        logger.info("verifying file %d of %d", number, len(manifest.files))
        verify_file(path / name, record)


def _only(path: Path) -> Path:
    """Return the file of `torch.save` that `path` is, or holds."""
    if path.is_file():
        return path
    files = [file for file in path.iterdir() if file.suffix in (".pt", ".pth")]
    if len(files) != 1:
        raise InvalidWeights(f"{path}: holds {len(files)} .pt or .pth files; name one of them")
    return files[0]


def _chosen(path: Path, choice: str | None, weights: Weights) -> tuple[ModelFamily, DecoderArgs]:
    """Return the family and hyper-parameters that `--model` names."""
    if choice is None:
        text = "holds no hyper-parameters"
        fix = "name the model with --model FAMILY/FLAVOR, such as llama3/8B"
        raise ConfigError(ConfigIssue(_IN, text, fix, str(path)))
    name, _, flavor = choice.partition("/")
    family = get_family(name)
    args = _with_vocabulary(decoder_args(family, family.resolve_args(flavor, {})), weights)
    with torch.device("meta"):
        wanted = dict(family.build(args).named_parameters())
    for key in [*wanted, *weights.tensors]:
        entry, tensor = weights.tensors.get(key), wanted.get(key)
        if entry is None or tensor is None or list(tensor.shape) != list(entry["shape"]):
            here = "missing" if entry is None else entry["shape"]
            there = "not in the model" if tensor is None else list(tensor.shape)
            raise InvalidWeights(f"{path}: {key} is {here}, and {there} by --model {choice}")
    return family, args


def decoder_args(family: ModelFamily, args: ModelArgs) -> DecoderArgs:
    """Return `args`; raise ConfigError for a family that no other program knows."""
    if isinstance(args, DecoderArgs) and family.hf_weights:
        return args
    text = "declares no names of Hugging Face's, so its weights cannot be exported"
    raise ConfigError(ConfigIssue("model.name", text, "see docs/guides/extending.md", family.name))


def _is_tied(source: WeightSource) -> bool:
    """Return whether the head is the embedding: Meta's files hold both, and do not say so."""
    rows, columns = source.tensors[_EMBEDDING]["shape"]
    if source.tensors[_HEAD]["shape"] != [rows, columns]:
        return False
    boxes = (((start, 0), (min(4096, rows - start), columns)) for start in range(0, rows, 4096))
    return all(
        torch.equal(source.read(_EMBEDDING, *box), source.read(_HEAD, *box)) for box in boxes
    )


def _with_vocabulary(args: DecoderArgs, weights: Weights) -> DecoderArgs:
    """Return the hyper-parameters with the vocabulary that the embedding has."""
    entry = weights.tensors.get(_EMBEDDING)
    if args.vocab_size is not None or entry is None:
        return args
    return args.model_copy(update={"vocab_size": entry["shape"][0]})


def open_tensors(path: Path) -> Weights:
    """Return the tensors of a checkpoint of any kind, whatever model they are of.

    Raises like `open_model`.
    """
    path = newest_step(path) or path
    kind = kind_of(path) if path.is_dir() or path.is_file() else None
    if kind not in ("step", "dcp", "torch"):
        return open_model(path).weights
    quiet_dcp()
    try:
        if kind == "torch":
            return TorchFile(_only(path))
        folder = read_model_folder(path)
        if folder.manifest is None:
            logger.warning("%s has no manifest, so damage would not be noticed", path)
        else:
            verify_files(path, folder.manifest)
        return folder
    except (InvalidWeights, InvalidCheckpoint) as error:
        raise CheckpointError(str(error)) from error
