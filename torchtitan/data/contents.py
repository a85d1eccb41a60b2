"""Digests of data files, by which a resume notices content that has changed at the same size.

Small data are read whole; of large data, blocks at even distances, with both ends of every file.
"""

import hashlib
import os
from collections.abc import Sequence
from concurrent.futures import ThreadPoolExecutor
from functools import lru_cache
from typing import Any

from torchtitan.config import DataError
from torchtitan.data.files import DataFile

_WHOLE_BYTES = 2**28
"""All files together, up to which they are read whole."""
_BLOCK_BYTES = 2**12
_MOST_BLOCKS, _FEWEST_BLOCKS = 64, 4
"""Of a file."""
_ALL_BLOCKS = 2**18
_THREADS = 16
"""Most of the time goes into waiting, on a file system of the network."""


def content_digests(files: Sequence[DataFile]) -> list[str]:
    """Return a digest of each file. Raises DataError for one that cannot be read.

    What stands before the colon says how a file was sampled, which depends on the other files;
    digests with different ones cannot be compared.
    """
    keys = []
    for file in files:
        try:
            status = os.stat(file.path)
        except OSError as error:
            raise DataError(f"{file.path}: cannot be read: {error.strerror}") from error
        keys.append((file.path, status.st_size, status.st_mtime_ns))
    return list(_digests(tuple(keys)))


def with_digests(source: Any) -> dict[str, Any]:
    """The description of a source, with a digest of each of its files."""
    description: dict[str, Any] = source.description
    files: Sequence[DataFile] = getattr(source, "files", ())
    if not files or len(files) != len(description.get("files", ())):
        return description
    digests = content_digests(files)
    named = [[*entry, digest] for entry, digest in zip(description["files"], digests)]
    return {**description, "files": named}


@lru_cache(maxsize=8)
def _digests(files: tuple[tuple[str, int, int], ...]) -> tuple[str, ...]:
    total = sum(size for _, size, _ in files)
    blocks = min(_MOST_BLOCKS, max(_FEWEST_BLOCKS, _ALL_BLOCKS // max(1, len(files))))
    largest = _WHOLE_BYTES if total <= _WHOLE_BYTES else blocks * _BLOCK_BYTES

    def digest(file: tuple[str, int, int]) -> str:
        path, size, _ = file
        found = hashlib.blake2b(digest_size=8)
        try:
            with open(path, "rb", buffering=0) as stream:
                if size <= largest:
                    while part := stream.read(2**20):
                        found.update(part)
                else:
                    for number in range(blocks):
                        stream.seek((size - _BLOCK_BYTES) * number // (blocks - 1))
                        found.update(stream.read(_BLOCK_BYTES))
        except OSError as error:
            raise DataError(f"{path}: cannot be read: {error.strerror}") from error
        return f"{'all' if size <= largest else blocks}:{found.hexdigest()}"

    if len(files) < _THREADS:
        return tuple(map(digest, files))
    with ThreadPoolExecutor(_THREADS) as pool:
        return tuple(pool.map(digest, files))
