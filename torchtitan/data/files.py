"""A file of a dataset: its kind, and reading it as bytes, plain or compressed."""

import codecs
import os
from dataclasses import dataclass
from functools import cached_property
from typing import BinaryIO, Literal

from torchtitan.config import DataError
from torchtitan.data.decode import MAGIC_BYTES, compression_of, decompressed, looks_like_text

KEY = "training.dataset_path"
BOM = codecs.BOM_UTF8
Kind = Literal["json", "text", "parquet"]

SUFFIXES: dict[str, Kind] = {
    ".jsonl": "json",
    ".ndjson": "json",
    ".json": "json",
    ".txt": "text",
    ".text": "text",
    ".parquet": "parquet",
}
COMPRESSIONS = {
    ".gz": "gzip",
    ".gzip": "gzip",
    ".zst": "zstd",
    ".zstd": "zstd",
    ".bz2": "bz2",
    ".xz": "xz",
}


@dataclass(frozen=True)
class DataFile:
    """A file as it was when the run started; reading notices when it has changed."""

    path: str
    size: int
    """Bytes on disk."""

    @cached_property
    def compression(self) -> str | None:
        """Return the compression, by content and then by suffix. Raises DataError."""
        by_content = compression_of(self.start)
        if by_content is None and not looks_like_text(self.start):
            return COMPRESSIONS.get(os.path.splitext(self.path)[1].lower())
        return by_content  # none, for example, where a download was decompressed on its way

    @cached_property
    def start(self) -> bytes:
        """The first bytes on the disk. Raises DataError."""
        try:
            with open(self.path, "rb") as file:
                return file.read(MAGIC_BYTES)
        except OSError as error:
            raise DataError(f"{self.path}: cannot be read: {error.strerror}") from error

    def open(self, max_window_bytes: int = 2**31) -> BinaryIO:
        """The (decompressed) content. Raises DataError if the file is not what it was."""
        try:
            size = os.path.getsize(self.path)
            file = open(self.path, "rb")  # noqa: SIM115 (the caller closes it)
        except OSError as error:
            raise DataError(f"{self.path}: cannot be read: {error.strerror}") from error
        if size != self.size:
            file.close()
            raise DataError(
                f"{self.path}: had {self.size} bytes when the run started and has {size} now;"
                " data files must not change during a run"
            )
        return decompressed(file, self.compression, max_window_bytes)


def suffix_kind(path: str) -> Kind | None:
    """Return what the suffix says about a file, looking through that of a compression."""
    stem, suffix = os.path.splitext(path.lower())
    if suffix not in COMPRESSIONS:
        return SUFFIXES.get(suffix)
    kind = SUFFIXES.get(os.path.splitext(stem)[1])
    # A footer at the end of a compressed file cannot be reached.
    return None if kind == "parquet" else kind
