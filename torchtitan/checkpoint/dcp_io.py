"""Safe reading and writing with `torch.distributed.checkpoint` (DCP).

DCP describes a checkpoint in `.metadata`, a pickle: whoever writes that file can run code in
whoever reads it, and can point the reader at files elsewhere. `SafeReader` unpickles only the
few plain classes that describe tensors, accepts only plain file names, and rejects entries that
are not tensors, which DCP would unpickle in full. DCP's own reader can still read a step folder.
"""

import io
import math
import os
import pickle
import warnings
from collections.abc import Iterator, Mapping
from contextlib import contextmanager
from enum import EnumMeta
from pathlib import Path
from typing import Any

import torch
from torch.distributed.checkpoint import FileSystemReader, FileSystemWriter
from torch.distributed.checkpoint.filesystem import FileSystem, _StorageInfo
from torch.distributed.checkpoint.metadata import (
    Metadata,
    MetadataIndex,
    StorageMeta,
    TensorStorageMetadata,
)

from torchtitan.checkpoint.files import open_regular
from torchtitan.checkpoint.manifest import InvalidCheckpoint, Manifest, verify_file

METADATA_NAME = ".metadata"

_METADATA_CLASSES = {
    "Metadata",
    "MetadataIndex",
    "StorageMeta",
    "TensorStorageMetadata",
    "BytesStorageMetadata",
    "ChunkStorageMetadata",
    "TensorProperties",
    "_MEM_FORMAT_ENCODING",
}
_OTHER_NAMES = {
    ("torch.distributed.checkpoint.filesystem", "_StorageInfo"),
    ("torch", "Size"),
    ("torch.serialization", "_get_layout"),
    ("pathlib", "PosixPath"),
    ("pathlib._local", "PosixPath"),
}


class UnsafeMetadata(Exception):
    """`.metadata` contains something that a description of tensors never needs."""


class SafeReader(FileSystemReader):
    """DCP's file reader, with a `.metadata` that cannot run code or leave its folder.

    `skip_objects`: see `read_metadata`.
    """

    def __init__(self, path: Path, skip_objects: bool = False):
        super().__init__(path)
        self._skip_objects = skip_objects
        self._metadata: Metadata | None = None

    def read_metadata(self, *args: Any, **kwargs: Any) -> Metadata:
        """Return the metadata, which are read once: DCP asks again in every load.

        Raises `UnsafeMetadata` or an unpickling error.
        """
        if self._metadata is None:
            self._metadata = read_metadata(Path(self.path), self._skip_objects)
        assert self._metadata.storage_meta is not None
        self._metadata.storage_meta.load_id = self.load_id
        return self._metadata


@contextmanager
def without_crc32() -> Iterator[None]:
    """Make `torch.save` skip its checksums, which take most of its time and which nothing reads.

    The manifest has a digest of every file.
    """
    before = torch.serialization.get_crc32_options()
    torch.serialization.set_crc32_options(False)
    try:
        yield
    finally:
        torch.serialization.set_crc32_options(before)


class WatchedFile(io.FileIO):
    """A file to write to, which keeps the errors that torch's writer hides."""

    def __init__(self, path: Path, errors: list[OSError]):
        super().__init__(path, "w")
        self._errors = errors

    def write(self, data: Any) -> int:
        """Write what the file system takes at once. Raises OSError with the file name."""
        try:
            return super().write(data)
        except OSError as error:
            error.filename = str(self.name)
            self._errors.append(error)
            raise


class _WatchedFiles(FileSystem):
    def __init__(self, errors: list[OSError]):
        self._errors = errors

    @contextmanager
    def create_stream(self, path: str | os.PathLike, mode: str) -> Iterator[io.IOBase]:  # type: ignore[type-arg]
        assert mode == "wb"
        with io.BufferedWriter(WatchedFile(Path(path), self._errors)) as stream:
            yield stream


class StepWriter(FileSystemWriter):
    """DCP's file writer for an empty folder.

    One thread: with more, an error in a helper thread is lost, and the save reports success without
    the data. No syncing here: some versions of DCP sync before they flush, so the commit does it.
    """

    def __init__(self, path: Path):
        super().__init__(path, sync_files=False, thread_count=1, overwrite=False)
        self.errors: list[OSError] = []
        """Errors of the file system: a full disk, a limit on file sizes, a quota."""
        self.fs = _WatchedFiles(self.errors)

    def storage_meta(self) -> StorageMeta:
        """Return metadata without a path: the folder will be renamed."""
        return StorageMeta(save_id=self.save_id)


def read_metadata(folder: Path, skip_objects: bool = False) -> Metadata:
    """Read `.metadata` of a folder without trusting its content.

    Entries that are not tensors, which a load would unpickle in full, are rejected, or left out of
    the result with `skip_objects`.
    """
    path = folder / METADATA_NAME
    with open_regular(path) as file:
        metadata = _Unpickler(io.BytesIO(file.read())).load()
    if not isinstance(metadata, Metadata) or not isinstance(metadata.storage_data, dict):
        raise UnsafeMetadata(f"{path}: does not describe a checkpoint")
    if not isinstance(metadata.storage_meta, StorageMeta):
        metadata.storage_meta = StorageMeta()
    for key, entry in list(metadata.state_dict_metadata.items()):
        if isinstance(key, str) and isinstance(entry, TensorStorageMetadata):
            continue
        if not skip_objects:
            raise UnsafeMetadata(f"{path}: {key!r} is not a tensor")
        del metadata.state_dict_metadata[key]
    for index, info in metadata.storage_data.items():
        if not isinstance(index, MetadataIndex) or not isinstance(info, _StorageInfo):
            raise UnsafeMetadata(f"{path}: {index!r} has no place in a file")
        name = info.relative_path
        if not isinstance(name, str) or os.path.basename(name) != name or name in ("", ".", ".."):
            raise UnsafeMetadata(f"{path}: {name!r} is not a plain file name")
        if info.transform_descriptors:
            raise UnsafeMetadata(f"{path}: {index.fqn!r} asks for a transformation")
    return metadata


def check_places(metadata: Metadata, sizes: Mapping[str, int]) -> None:
    """Raise `UnsafeMetadata` unless the files hold every chunk, and chunks cover their tensors.

    `sizes`: bytes of each file by name.
    """
    for name, entry in metadata.state_dict_metadata.items():
        found = 0
        for chunk in entry.chunks:
            place = metadata.storage_data.get(MetadataIndex(name, chunk.offsets))
            if place is None or place.relative_path not in sizes:
                raise UnsafeMetadata(f"{name} was not written")
            if place.offset + place.length > sizes[place.relative_path]:
                raise UnsafeMetadata(f"{name} lies beyond the end of {place.relative_path}")
            found += math.prod(chunk.sizes)
        if found != math.prod(entry.size):
            raise UnsafeMetadata(f"{name} was not written whole")


def check_metadata(folder: Path, manifest: Manifest) -> None:
    """Raise `InvalidCheckpoint` unless `.metadata` fits the files and tensors of the manifest."""
    path = folder / METADATA_NAME
    if METADATA_NAME not in manifest.files:
        raise InvalidCheckpoint(f"{path}: is not listed in the manifest")
    verify_file(path, manifest.files[METADATA_NAME])  # first: a damaged pickle is never read
    try:
        metadata = read_metadata(folder)
        described = {
            name: describe_entry(entry) for name, entry in metadata.state_dict_metadata.items()
        }
        check_places(metadata, {name: record.size for name, record in manifest.files.items()})
    except Exception as error:  # a damaged pickle can raise anything
        raise InvalidCheckpoint(f"{path}: {error or type(error).__name__}") from error
    if described != dict(manifest.tensors):
        raise InvalidCheckpoint(f"{path}: describes other tensors than the manifest")


def describe_tensor(tensor: torch.Tensor) -> dict[str, Any]:
    """Return type and global shape as a manifest lists them."""
    return _describe(tensor.dtype, tensor.shape)


def describe_entry(entry: TensorStorageMetadata) -> dict[str, Any]:
    """Return the same for a tensor in `.metadata`."""
    return _describe(entry.properties.dtype, entry.size)


def _describe(dtype: torch.dtype, shape: torch.Size) -> dict[str, Any]:
    return {"dtype": str(dtype).removeprefix("torch."), "shape": list(shape)}


def quiet_dcp() -> None:
    """Silence DCP's advice to developers, for good: a thread must not change the filters."""
    warnings.filterwarnings("ignore", message="torch.distributed is disabled")
    warnings.filterwarnings("ignore", message="TypedStorage is deprecated")


class _Unpickler(pickle.Unpickler):
    def find_class(self, module: str, name: str) -> Any:
        if module == "torch.distributed.checkpoint.metadata" and name in _METADATA_CLASSES:
            return super().find_class(module, name)
        if (module, name) in _OTHER_NAMES:
            return super().find_class(module, name)
        if module == "torch" and isinstance(getattr(torch, name, None), torch.dtype):
            return super().find_class(module, name)
        if (module, name) == ("builtins", "getattr"):
            return _enum_member
        raise UnsafeMetadata(f"{METADATA_NAME} asks for {module}.{name}")


def _enum_member(kind: Any, name: str) -> Any:
    """Return a member of an enum: Python 3.11.0 to 3.11.3 pickle it as `getattr(kind, name)`."""
    if isinstance(kind, EnumMeta) and name in kind.__members__:
        return kind[name]
    raise UnsafeMetadata(f"{METADATA_NAME} asks for {name} of {kind!r}")
