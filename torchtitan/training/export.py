"""Export and convert models: open any checkpoint, write it in another format, read that back."""

import logging
import os
import secrets
import shutil
from collections.abc import Callable, Iterator, Mapping
from contextlib import contextmanager
from dataclasses import dataclass, replace
from functools import partial
from pathlib import Path
from typing import Any

import torch
import torch.distributed.checkpoint as dcp
from pydantic import ValidationError

from torchtitan.checkpoint.dcp_io import StepWriter, quiet_dcp
from torchtitan.checkpoint.manifest import InvalidCheckpoint, Manifest, verify_file
from torchtitan.checkpoint.model_folder import read_model_folder
from torchtitan.config import CheckpointError, ConfigError, ConfigIssue, JobConfig
from torchtitan.config.custom_import import import_custom_modules
from torchtitan.config.value_errors import problems_of
from torchtitan.data.tokenizers import build_tokenizer
from torchtitan.handlers.registry import handler_settings
from torchtitan.models.decoder.args import DecoderArgs
from torchtitan.models.family import ModelFamily
from torchtitan.models.registry import get_family
from torchtitan.models.spec import ModelArgs
from torchtitan.training.pretrained import newest_step, require_plain_model
from torchtitan.training.pretrained_config import tokenizer_of_step
from torchtitan.utils.files import sync_folder
from torchtitan.utils.text import format_bytes
from torchtitan.weights.description import describe_model
from torchtitan.weights.readback import read_back
from torchtitan.weights.recognise import InvalidWeights, kind_of
from torchtitan.weights.source import open_weights
from torchtitan.weights.stored_model import StoredModel, Weights, read_tensors, target_dtype
from torchtitan.weights.tokenizer_files import folder_of_tokenizer, read_json, tokenizer_folder
from torchtitan.weights.torch_file import TorchFile
from torchtitan.weights.writer import write_hf

logger = logging.getLogger(__name__)

_IN, _OUT = "IN", "OUT"
_EMBEDDING = "tok_embeddings.weight"
_TOKEN_KEYS = ("bos_token_id", "eos_token_id", "pad_token_id")


@dataclass(frozen=True)
class Target:
    """The file or folder to write, and how; see `torchtitan export --help`."""

    path: Path
    format: str = "hf"
    dtype: str | None = None
    max_shard_size: str = "5GB"


def check_target(path: Path) -> list[ConfigIssue]:
    """Return the issues of a file or folder to be made."""
    if os.path.lexists(path):
        fix = "remove it, or choose another name"
        return [ConfigIssue(_OUT, "exists already", fix, str(path))]
    if not path.absolute().parent.is_dir():
        text = "lies in a folder that does not exist"
        return [ConfigIssue(_OUT, text, "make the folder", str(path))]
    return []


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
        args = _decoder_args(family, description.resolved())
        source = open_weights(path, family, args)
        args = _with_vocabulary(args, source)
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
    try:
        config = JobConfig.model_validate(manifest.info.get("config"))
    except ValidationError as error:
        raise ConfigError(problems_of(error, {})) from None
    if problems := import_custom_modules(config):
        raise ConfigError(problems)
    require_plain_model(config)
    family = get_family(config.model.name)
    rows = folder.tensors.get(_EMBEDDING, {}).get("shape", [None])[0]
    args = _decoder_args(family, family.resolve(config.model, rows))
    if "flex_attention" in config.model.handlers:
        masks = handler_settings(config, "flex_attention")
        args = args.model_copy(update={"sliding_window": masks.chosen_window(args.sliding_window)})
    tokenizer = tokenizer_path or tokenizer_of_step(path)
    training = {
        "step": manifest.step,
        "state": manifest.state,
        "config": manifest.info["config"],
        "versions": manifest.info.get("versions"),
    }
    return StoredModel(path, family, args, folder, tokenizer, training)


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
    args = _with_vocabulary(_decoder_args(family, family.resolve_args(flavor, {})), weights)
    with torch.device("meta"):
        wanted = dict(family.build(args).named_parameters())
    for key in [*wanted, *weights.tensors]:
        entry, tensor = weights.tensors.get(key), wanted.get(key)
        if entry is None or tensor is None or list(tensor.shape) != list(entry["shape"]):
            here = "missing" if entry is None else entry["shape"]
            there = "not in the model" if tensor is None else list(tensor.shape)
            raise InvalidWeights(f"{path}: {key} is {here}, and {there} by --model {choice}")
    return family, args


def _decoder_args(family: ModelFamily, args: ModelArgs) -> DecoderArgs:
    if isinstance(args, DecoderArgs) and family.hf_weights:
        return args
    text = "declares no names of Hugging Face's, so its weights cannot be exported"
    raise ConfigError(ConfigIssue("model.name", text, "see docs/extending.md", family.name))


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


def write_model(model: StoredModel, target: Target) -> str:
    """Write a model, read it back, and give it its name; return a sentence about it.

    Nothing is there unless all of it is right. Raises CheckpointError.
    """
    return _written(target, model.weights, lambda new: _OF_MODELS[target.format](model, new))


def write_tensors(weights: Weights, target: Target) -> str:
    """Write tensors only, as `write_model` does."""
    return _written(target, weights, lambda new: _OF_TENSORS[target.format](weights, new))


def _written(target: Target, weights: Weights, write: "Callable[[Target], _Check]") -> str:
    logger.info("writing %s", target.path)
    try:
        with _new_path(target.path.absolute()) as temporary:
            check = write(replace(target, path=temporary))
            logger.info("reading it back")
            text = check(temporary)
            size = _size(temporary)
    except (InvalidWeights, InvalidCheckpoint) as error:
        raise CheckpointError(f"{target.path} was not written: {error}") from error
    except (OSError, RuntimeError) as error:  # torch's own writer raises the latter
        raise CheckpointError(f"{target.path} could not be written: {error}") from error
    return f"{target.path}: {len(weights.tensors)} tensors, {format_bytes(size)}; {text}"


_Check = Callable[[Path], str]
"""Reads what was written back; returns what it found."""


def _write_hf(model: StoredModel, target: Target) -> _Check:
    target.path.mkdir()
    write_hf(target.path, model, token_ids(model), target.dtype, target.max_shard_size)
    return partial(_read_back, model, partial(_dtype_of, model, target.dtype))


def _write_dcp(weights: Weights, target: Target) -> _Check:
    target.path.mkdir()
    tensors = dict(read_tensors(weights, weights.tensors, target.dtype))
    dcp.save(tensors, storage_writer=StepWriter(target.path), no_dist=True)
    return lambda path: _compare(weights, read_model_folder(path), target.dtype)


def _write_torch(weights: Weights, target: Target) -> _Check:
    tensors = dict(read_tensors(weights, weights.tensors, target.dtype))
    torch.save(tensors, target.path)
    return lambda path: _compare(weights, TorchFile(path), target.dtype)


_OF_MODELS: Mapping[str, Callable[[StoredModel, Target], _Check]] = {"hf": _write_hf}
_OF_TENSORS: Mapping[str, Callable[[Weights, Target], _Check]] = {
    "dcp": _write_dcp,
    "pt": _write_torch,
}
"""Formats that need no hyper-parameters."""


def _dtype_of(model: StoredModel, dtype: str | None, name: str) -> torch.dtype:
    return target_dtype(model.weights.tensors[name], dtype)


def _read_back(model: StoredModel, dtype_of: Callable[[str], torch.dtype], path: Path) -> str:
    found = read_back(model, path, dtype_of)
    text = f"reads back with a KL divergence of {found.ours:.1g} (bound {found.bound:.0e})"
    if found.transformers is not None:
        return f"{text}, in transformers {found.transformers:.1g}"
    return f"{text}; transformers was not asked: {found.why_not}"


def _compare(weights: Weights, written: Weights, dtype: str | None) -> str:
    """Compare every tensor. Raises `InvalidWeights` naming one that differs."""
    names = list(weights.tensors)
    pairs = zip(read_tensors(weights, names, dtype), read_tensors(written, names))
    for (name, ours), (_, theirs) in pairs:
        if not torch.equal(ours, theirs):
            raise InvalidWeights(f"{name} differs in what was written")
    return "reads back bit by bit"


def token_ids(model: StoredModel) -> dict[str, Any]:
    """Return the ids of the tokens that begin, end and pad a text, as configs name them."""
    if model.tokenizer_path is None:
        return {}
    tokenizer = build_tokenizer(model.tokenizer_path)
    ids = {"bos_token_id": tokenizer.bos_id, "eos_token_id": tokenizer.eos_id}
    stored = read_json(folder_of_tokenizer(model.tokenizer_path) / "config.json")
    return ids | {key: stored[key] for key in _TOKEN_KEYS if stored.get(key) is not None}


@contextmanager
def _new_path(path: Path) -> Iterator[Path]:
    """Yield a temporary name; what is made there gets the name `path` in the end.

    Raises FileExistsError if that exists by then.
    """
    temporary = path.with_name(f".{path.name}.{secrets.token_hex(4)}")
    try:
        yield temporary
        if temporary.is_dir():
            for file in temporary.iterdir():
                _sync(file)
            sync_folder(temporary)
            if os.path.lexists(path):
                raise FileExistsError(f"{path} has appeared meanwhile")
            os.rename(temporary, path)
        else:
            _sync(temporary)
            _link(temporary, path)
        sync_folder(path.parent)
    finally:
        shutil.rmtree(temporary, ignore_errors=True)
        temporary.unlink(missing_ok=True)


def _sync(file: Path) -> None:
    with open(file, "rb") as opened:
        os.fsync(opened.fileno())


def _link(temporary: Path, file: Path) -> None:
    """Rename a finished file. Raises FileExistsError if the name is taken."""
    try:
        os.link(temporary, file)
    except FileExistsError:
        raise
    except OSError:  # not every file system has hard links
        with open(file, "xb"):
            pass  # reserve the name
        try:
            os.replace(temporary, file)
        except OSError:
            file.unlink()
            raise


def _size(path: Path) -> int:
    files = [path] if path.is_file() else list(path.iterdir())
    return sum(file.stat().st_size for file in files)
