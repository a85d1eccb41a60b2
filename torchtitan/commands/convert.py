"""`torchtitan convert dcp-to-torch`: the weights of a checkpoint as one file of `torch.save`."""

import argparse
import math
import os
import secrets
import sys
import time
from collections.abc import Iterator
from pathlib import Path

import torch

from torchtitan.checkpoint.dcp_io import quiet_dcp
from torchtitan.checkpoint.manifest import InvalidCheckpoint, verify_file
from torchtitan.checkpoint.model_folder import ModelFolder, read_model_folder
from torchtitan.checkpoint.steps_folder import step_folders, step_name
from torchtitan.config import CheckpointError
from torchtitan.config.errors import ConfigError, ConfigIssue
from torchtitan.config.paths import expand_path
from torchtitan.utils.dtypes import torch_dtype

_BATCH_BYTES = 2**30
_SECONDS_BETWEEN_LINES = 5.0


def run(options: argparse.Namespace) -> int:
    """Check the paths, then convert; exit status 0."""
    folder, file = Path(expand_path(options.folder)), Path(expand_path(options.file))
    problems = []
    if not folder.is_dir():
        text = "is not a folder" if folder.exists() else "does not exist"
        fix = "name the folder of a checkpoint, such as outputs/checkpoint/step-1000"
        problems.append(ConfigIssue("FOLDER", text, fix, str(folder)))
    elif (steps := step_folders(folder)) and not (folder / ".metadata").exists():
        fix = f"name one, such as {folder / step_name(steps[-1])}"
        problems.append(ConfigIssue("FOLDER", "holds several checkpoints", fix, str(folder)))
    if os.path.lexists(file):
        fix = "remove it, or choose another name"
        problems.append(ConfigIssue("FILE", "exists already", fix, str(file)))
    elif not file.absolute().parent.is_dir():
        text = "lies in a folder that does not exist"
        problems.append(ConfigIssue("FILE", text, "make the folder", str(file)))
    if problems:
        raise ConfigError(problems)
    dcp_to_torch(folder.resolve(), file.absolute(), options.dtype)
    return 0


def dcp_to_torch(path: Path, file: Path, dtype: str | None) -> None:
    """Write `file` from the checkpoint `path`; `dtype` None keeps the types.

    Unlike torch's `dcp_to_torch_save` it runs no code from the checkpoint, verifies every byte
    against the manifest if there is one, omits the optimizer, and replaces no file. Raises
    CheckpointError, and leaves no file then.
    """
    quiet_dcp()
    try:
        folder = read_model_folder(path)
        _verify(folder)
    except InvalidCheckpoint as error:
        raise CheckpointError(str(error)) from error
    weights = _read(folder, None if dtype is None else torch_dtype(dtype))
    _say(f"writing {file}")
    try:
        _save_new(weights, file)
    except (OSError, RuntimeError) as error:  # torch's own writer raises the latter
        raise CheckpointError(f"{file} could not be written: {error}") from error
    size = file.stat().st_size / 2**30
    print(f"{file}: {len(weights)} tensors, {size:.3g} GiB")


def _verify(folder: ModelFolder) -> None:
    if folder.manifest is None:
        _say(f"{folder.path} has no manifest, so damage would not be noticed")
        return
    for number, (name, record) in enumerate(folder.manifest.files.items(), start=1):
        _say(f"verifying file {number} of {len(folder.manifest.files)}")
        verify_file(folder.path / name, record)


def _read(folder: ModelFolder, dtype: torch.dtype | None) -> dict[str, torch.Tensor]:
    weights: dict[str, torch.Tensor] = {}
    printed = -math.inf
    for batch in _batches(folder):
        if time.monotonic() - printed > _SECONDS_BETWEEN_LINES:
            _say(f"reading: {len(weights)} of {len(folder.tensors)} tensors")
            printed = time.monotonic()
        try:
            folder.load(batch)
        except Exception as error:  # torch does not document what a damaged file raises
            raise CheckpointError(f"{folder.path} could not be read: {error}") from error
        for name, tensor in batch.items():
            weights[name] = tensor
            if dtype is not None and tensor.is_floating_point():
                weights[name] = tensor.to(dtype)
                if tensor.isfinite().all() and not weights[name].isfinite().all():
                    raise CheckpointError(f"{name} has values that are too large for {dtype}")
    return weights


def _batches(folder: ModelFolder) -> Iterator[dict[str, torch.Tensor]]:
    """Yield empty tensors to read into, about `_BATCH_BYTES` at a time."""
    batch: dict[str, torch.Tensor] = {}
    size = 0
    for name, entry in folder.tensors.items():
        batch[name] = torch.empty(entry["shape"], dtype=getattr(torch, entry["dtype"]))
        size += batch[name].numel() * batch[name].element_size()
        if size >= _BATCH_BYTES:
            yield batch
            batch, size = {}, 0
    if batch:
        yield batch


def _save_new(weights: dict[str, torch.Tensor], file: Path) -> None:
    """Write all or nothing; never replace a file."""
    temporary = file.with_name(f".{file.name}.{secrets.token_hex(4)}")
    try:
        with open(temporary, "xb") as stream:
            torch.save(weights, stream)
            stream.flush()
            os.fsync(stream.fileno())
        _name(temporary, file)
    finally:
        temporary.unlink(missing_ok=True)


def _name(temporary: Path, file: Path) -> None:
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


def _say(text: str) -> None:
    print(text, file=sys.stderr)
