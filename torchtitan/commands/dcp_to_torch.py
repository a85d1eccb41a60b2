"""Convert the weights of a checkpoint folder to one file of `torch.save`.

Unlike torch's `dcp_to_torch_save` it runs no code from the checkpoint, verifies every byte against
the manifest if there is one, omits the optimizer, converts types, and replaces no file.
"""

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
from torchtitan.config import CheckpointError
from torchtitan.utils.dtypes import torch_dtype

_BATCH_BYTES = 2**30
_SECONDS_BETWEEN_LINES = 5.0


def dcp_to_torch(path: Path, file: Path, dtype: str | None) -> None:
    """Write the new file `file` from the folder `path`; `dtype` None keeps the types.

    Raises `CheckpointError`, and leaves no file then.
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
    told = -math.inf
    for batch in _batches(folder):
        if time.monotonic() - told > _SECONDS_BETWEEN_LINES:
            _say(f"reading: {len(weights)} of {len(folder.tensors)} tensors")
            told = time.monotonic()
        try:
            folder.load(batch)
        except Exception as error:  # torch documents no errors for damaged files
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
    """Write `file` atomically, and never over a file that appeared meanwhile."""
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
    """Give a finished file its name. Raises FileExistsError where that is taken."""
    try:
        os.link(temporary, file)
    except FileExistsError:
        raise
    except OSError:  # not every file system has hard links
        with open(file, "xb"):
            pass  # reserves the name, so that no other file is replaced
        try:
            os.replace(temporary, file)
        except OSError:
            file.unlink()
            raise


def _say(text: str) -> None:
    print(text, file=sys.stderr)
