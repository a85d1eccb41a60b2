"""Write a model in any format, all or nothing, and read it back."""

import glob
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
from torch.distributed.checkpoint.api import CheckpointException

from torchtitan.checkpoint.dcp_io import METADATA_NAME, StepWriter
from torchtitan.checkpoint.manifest import MANIFEST_NAME, InvalidCheckpoint
from torchtitan.checkpoint.model_folder import read_model_folder
from torchtitan.checkpoint.steps_folder import step_folders, step_name
from torchtitan.config import CheckpointError, ConfigError, ConfigIssue
from torchtitan.data.tokenizers import build_tokenizer
from torchtitan.training.adapters import AdaptedModel
from torchtitan.utils.files import sync_folder
from torchtitan.utils.text import format_bytes
from torchtitan.weights.gguf_writer import gguf_dtype, write_gguf
from torchtitan.weights.meta_writer import write_meta
from torchtitan.weights.readback import (
    BOUNDS,
    SAME_WEIGHTS,
    divergence,
    logits_of_peft,
    probe,
    read_back,
    why_no_transformers,
)
from torchtitan.weights.recognise import InvalidWeights, kind_of
from torchtitan.weights.stored_model import (
    DtypeOf,
    StoredModel,
    Weights,
    read_tensors,
    target_dtype,
)
from torchtitan.weights.tokenizer_files import folder_of_tokenizer, read_json, tokenizer_folder
from torchtitan.weights.torch_file import TorchFile
from torchtitan.weights.writer import write_hf

logger = logging.getLogger(__name__)

_OUT = "OUT"
_TOKEN_KEYS = ("bos_token_id", "eos_token_id", "pad_token_id")
_UNFINISHED = ".unfinished"


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
    if _would_damage(path.absolute()):
        text = "would count as a part of a run's checkpoints, and as damage"
        return [ConfigIssue(_OUT, text, "choose a folder outside of them", str(path))]
    return []


def _would_damage(path: Path) -> bool:
    """Return whether a path lies in a step, or has a step's name among those of a run."""
    if any((parent / METADATA_NAME).is_file() for parent in path.parents):
        return True
    steps = [path.parent / step_name(step) for step in step_folders(path.parent)]
    is_of_run = any((step / MANIFEST_NAME).exists() for step in steps)
    return is_of_run and path.name.startswith("step-")


def write_model(model: StoredModel, target: Target) -> str:
    """Write a model, read it back, and give it its name; return a sentence about it.

    Nothing is there unless all of it is right. Raises CheckpointError.
    """
    _require_rows(model)
    done = _written(target, model.weights, lambda new: _OF_MODELS[target.format](model, new))
    if target.path.is_dir() and tokenizer_folder(target.path) is None:
        named = "none is known" if model.tokenizer_path is None else model.tokenizer_path
        logger.warning("%s has no tokenizer files (tokenizer: %s)", target.path, named)
    return done


def write_tensors(weights: Weights, target: Target) -> str:
    """Write tensors only, as `write_model` does."""
    return _written(target, weights, lambda new: _OF_TENSORS[target.format](weights, new))


def write_adapter(adapted: AdaptedModel, target: Target) -> str:
    """Write adapters in PEFT's format, as `write_model` does.

    Raises ConfigError for a step that holds its base, which peft could not have.
    """
    if adapted.base.path == adapted.model.path:
        text = "began with random weights, so its adapters are of no use alone"
        raise ConfigError(ConfigIssue("--adapter", text, "write --merge", str(adapted.base.path)))
    return _written(target, adapted.model.weights, lambda new: _write_adapter(adapted, new))


def _write_adapter(adapted: AdaptedModel, target: Target) -> "_Check":
    target.path.mkdir()
    weights = adapted.model.weights
    written = dict(read_tensors(weights, weights.tensors, target.dtype))
    adapted.handler.handler.write_added(target.path, written, adapted.base)
    return partial(_read_adapter_back, adapted, written)


def _read_adapter_back(
    adapted: AdaptedModel, written: Mapping[str, torch.Tensor], path: Path
) -> str:
    """Compare the adapters, and the base's logits with them. Raises `InvalidWeights`."""
    found = adapted.handler.handler.read_added(path, adapted.base)
    for name in written.keys() | found.keys():
        if name not in found or name not in written or not torch.equal(found[name], written[name]):
            raise InvalidWeights(f"{name} differs in what was written")
    tokens = probe(adapted.base.args)
    expected = adapted.logits(tokens)
    ours = divergence(expected, adapted.logits(tokens, found))
    types = {str(tensor.dtype).removeprefix("torch.") for tensor in written.values()}
    bound = max(BOUNDS.get(name, SAME_WEIGHTS) for name in types)
    text = f"reads back with a KL divergence of {ours:.1g} (bound {bound:.0e})"
    if not ours < bound:
        raise InvalidWeights(f"{text}: the adapters compute something else")
    why_not = why_no_transformers(adapted.base, "peft")
    if why_not or kind_of(adapted.base.path) != "hf":
        return f"{text}; peft was not asked: {why_not or 'it reads Hugging Face folders'}"
    with adapted.handler.handler.on_plain_base() as differs:
        expected = adapted.logits(tokens) if differs else expected
    theirs = divergence(expected, logits_of_peft(adapted.base.path, path, tokens))
    if not theirs < bound:
        raise InvalidWeights(f"peft computes something else: a KL divergence of {theirs:.2g}")
    return f"{text}, in peft {theirs:.1g}"


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
    except (OSError, RuntimeError, CheckpointException) as error:  # torch's writers raise these
        first = (str(error).strip() or type(error).__name__).splitlines()[0]
        raise CheckpointError(f"{target.path} could not be written: {first}") from error
    return f"{target.path}: {len(weights.tensors)} tensors, {format_bytes(size)}; {text}"


_Check = Callable[[Path], str]
"""Reads what was written back; returns what it found."""


def _write_hf(model: StoredModel, target: Target) -> _Check:
    target.path.mkdir()
    write_hf(target.path, model, token_ids(model), target.dtype, target.max_shard_size)
    return partial(_read_back, model, partial(_dtype_of, model, target.dtype))


def _write_meta(model: StoredModel, target: Target) -> _Check:
    target.path.mkdir()
    write_meta(target.path, model, target.dtype)
    return partial(_read_back, model, partial(_dtype_of, model, target.dtype), ties=False)


def _write_gguf(model: StoredModel, target: Target) -> _Check:
    write_gguf(target.path, model, target.dtype)
    return partial(_read_back, model, partial(gguf_dtype, model, target.dtype))


def _write_dcp(weights: Weights, target: Target) -> _Check:
    target.path.mkdir()
    tensors = dict(read_tensors(weights, weights.tensors, target.dtype))
    dcp.save(tensors, storage_writer=StepWriter(target.path), no_dist=True)
    return lambda path: _compare(weights, read_model_folder(path), target.dtype)


def _write_torch(weights: Weights, target: Target) -> _Check:
    tensors = dict(read_tensors(weights, weights.tensors, target.dtype))
    torch.save(tensors, target.path)
    return lambda path: _compare(weights, TorchFile(path), target.dtype)


_OF_MODELS: Mapping[str, Callable[[StoredModel, Target], _Check]] = {
    "hf": _write_hf,
    "meta": _write_meta,
    "gguf": _write_gguf,
}
_OF_TENSORS: Mapping[str, Callable[[Weights, Target], _Check]] = {
    "dcp": _write_dcp,
    "pt": _write_torch,
}
"""Formats that need no hyper-parameters."""


def _require_rows(model: StoredModel) -> None:
    """Raise CheckpointError if the tokenizer has tokens that the embedding has no row for."""
    rows = model.args.vocab_size
    if model.tokenizer_path is None or rows is None:
        return
    tokens = build_tokenizer(model.tokenizer_path).vocab_size
    if tokens > rows:
        text = f"{model.tokenizer_path} has {tokens} tokens, but the model only {rows} rows"
        raise CheckpointError(f"{text}; name its own tokenizer with --tokenizer")


def _dtype_of(model: StoredModel, dtype: str | None, name: str) -> torch.dtype:
    return target_dtype(model.weights.tensors[name], dtype)


def _read_back(model: StoredModel, dtype_of: DtypeOf, path: Path, ties: bool = True) -> str:
    found = read_back(model, path, dtype_of, ties)
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
    for left in path.parent.glob(f".{glob.escape(path.name)}.*{_UNFINISHED}"):
        logger.warning("%s is of an export that was killed, unless one runs; remove it", left)
    temporary = path.with_name(f".{path.name}.{secrets.token_hex(4)}{_UNFINISHED}")
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
        if temporary.is_dir():
            shutil.rmtree(temporary, ignore_errors=True)
        else:
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
