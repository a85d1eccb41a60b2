"""The model in a folder saved by `torch.distributed.checkpoint`, here or in another program.

A step of this library names tensors as the model does and has a manifest. Folders of other programs
have none; their names may begin with `model.`, and entries that are not the model's are ignored.
"""

import os
from collections.abc import Mapping
from dataclasses import dataclass
from functools import cached_property
from pathlib import Path
from typing import Any

import torch
import torch.distributed as dist
import torch.distributed.checkpoint as dcp

from torchtitan.checkpoint.dcp_io import (
    METADATA_NAME,
    SafeReader,
    check_metadata,
    check_places,
    describe_entry,
    read_metadata,
)
from torchtitan.checkpoint.manifest import (
    HANDLER_PREFIX,
    MANIFEST_NAME,
    OPTIMIZER_PREFIX,
    InvalidCheckpoint,
    Manifest,
    check_listing,
    read_manifest,
)

_MODEL_PREFIX = "model."
# TorchTitan's entries that are not the model's.
_OTHER_PARTS = ("optimizer", "lr_scheduler", "dataloader", "ft_dataloader", "train_state")
# A table that follows from the config, which TorchTitan saved until early 2025.
_DERIVED = ("freqs_cis",)


@dataclass(frozen=True)
class ModelFolder:
    """The model's `tensors` by name, as in `Manifest.tensors`; in the files with a `prefix`."""

    path: Path
    manifest: Manifest | None
    tensors: Mapping[str, dict[str, Any]]
    prefix: str = ""

    @property
    def files(self) -> list[Path]:
        """The files that hold the tensors."""
        return [self.path / METADATA_NAME, *sorted(self.path.glob("*.distcp"))]

    def load(
        self, tensors: Mapping[str, torch.Tensor], group: dist.ProcessGroup | None = None
    ) -> None:
        """Fill tensors of these names in place, converting types that differ.

        With `group` all its ranks must call it, and each fills its parts of DTensors.
        """
        named = {self.prefix + name: tensor for name, tensor in tensors.items()}
        dcp.load(named, storage_reader=self._reader, process_group=group, no_dist=group is None)

    @cached_property
    def _reader(self) -> SafeReader:
        return SafeReader(self.path, skip_objects=self.manifest is None)


def read_model_folder(path: Path) -> ModelFolder:
    """Return the model of a folder from names and sizes. Raises `InvalidCheckpoint`."""
    if os.path.lexists(path / MANIFEST_NAME):
        manifest = read_manifest(path)
        check_listing(path, manifest)
        check_metadata(path, manifest)
        tensors = {
            name: entry
            for name, entry in manifest.tensors.items()
            if not name.startswith((OPTIMIZER_PREFIX, HANDLER_PREFIX))
        }
        return ModelFolder(path, manifest, tensors)
    try:
        metadata = read_metadata(path, skip_objects=True)
        sizes = {
            entry.name: entry.stat(follow_symlinks=False).st_size for entry in os.scandir(path)
        }
        check_places(metadata, sizes)
    except Exception as error:  # a damaged pickle can raise anything
        raise InvalidCheckpoint(
            f"{path / METADATA_NAME}: {error or type(error).__name__}"
        ) from error
    stored = {
        name: describe_entry(entry)
        for name, entry in metadata.state_dict_metadata.items()
        if name.split(".")[0] not in _OTHER_PARTS and name.split(".")[-1] not in _DERIVED
    }
    if not stored:
        raise InvalidCheckpoint(f"{path / METADATA_NAME}: names no tensor of a model")
    prefix = _MODEL_PREFIX if all(name.startswith(_MODEL_PREFIX) for name in stored) else ""
    return ModelFolder(path, None, {n[len(prefix) :]: d for n, d in stored.items()}, prefix)
