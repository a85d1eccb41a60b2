"""Files of a dataset: their kind, and their content in UTF-8, however compressed and encoded."""

import codecs
import os
from collections.abc import Iterator, Sequence
from dataclasses import dataclass
from functools import cached_property
from itertools import islice
from typing import TYPE_CHECKING, Any, BinaryIO, Literal

from torchtitan.config import DataError
from torchtitan.config.schema import Data
from torchtitan.data.decode import (
    MAGIC_BYTES,
    compression_of,
    corruption,
    decompressed,
    encoding_of,
    looks_like_text,
    transcoded,
    transient_cause,
)
from torchtitan.data.pieces import Shard
from torchtitan.data.sources import Row

if TYPE_CHECKING:
    from torchtitan.data.listing import Listing

_DESCRIBED_FILES = 256
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
        """Return the decompressed content. Raises DataError if the file has changed."""
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


def relative_names(files: Sequence[DataFile]) -> list[str]:
    """Return the files' paths below their common folder: the same after the data have moved."""
    paths = [os.path.abspath(file.path) for file in files]
    folder = os.path.commonpath({os.path.dirname(path) for path in paths})
    return [path[len(folder) :].lstrip("/") for path in paths]


class FileSource:
    """Files that are read as UTF-8, whatever their compression and encoding."""

    listing: "Listing | None" = None
    """The result of the search for the files."""

    def __init__(self, files: Sequence[DataFile], data: Data):
        self.files = list(files)
        self.encoding = data.encoding
        self.max_document_bytes = data.max_document_bytes
        self._max_window_bytes = data.max_zstd_window_mib * 2**20
        sizes = [file.size for file in self.files]
        self.description: dict[str, Any] = {
            "files": [list(item) for item in zip(relative_names(files), sizes, strict=True)]
        }
        if data.encoding is not None:
            self.description["encoding"] = data.encoding

    def num_bytes(self, shard: Shard) -> int:
        """Return the bytes on disk that a shard covers."""
        return self.files[shard.file].size if shard.end is None else shard.end - shard.start

    def rows(self, shard: Shard) -> Iterator[Row]:
        """Yield the rows of a shard."""
        rows = self._rows(shard)
        return rows if shard.stride == 1 else islice(rows, shard.offset, None, shard.stride)

    def open(self, file: DataFile) -> BinaryIO:
        """Return the content in UTF-8. Raises DataError."""
        stream = file.open(self._max_window_bytes)
        try:
            start = file.start if file.compression is None else stream.peek(4)  # type: ignore[attr-defined]
        except BaseException:
            stream.close()
            raise
        encoding = self._encoding(start)
        if _is_utf8(encoding):
            return stream
        return transcoded(stream, encoding)

    def describe_encoding(self) -> str:
        """Name the first file in another encoding than configured, of the first files."""
        for file in self.files[:_DESCRIBED_FILES]:
            try:
                with file.open(self._max_window_bytes) as stream:
                    encoding = self._encoding(stream.peek(4))  # type: ignore[attr-defined]
            except Exception as error:
                if not isinstance(error, DataError) and corruption(error) is None:
                    raise
                continue  # reading its rows reports it
            if encoding != self.encoding and not _is_utf8(encoding):
                return f"{file.path} is decoded from {encoding.upper()}, which its first bytes name"
        return ""

    def can_seek(self, file: DataFile) -> bool:
        """Return whether bytes of the content lie at the same places on disk. Raises DataError."""
        return file.compression is None and _is_utf8(self._encoding(file.start))

    def locate(self, shard: Shard, row: Row) -> str:
        """Return where a row is, for a message."""
        file = self.files[shard.file]
        line, left = 1, row.place
        try:
            with self.open(file) as stream:
                while left > 0 and (part := stream.read(min(left, 1 << 20))):
                    line += part.count(b"\n")
                    left -= len(part)
        except Exception as error:
            if isinstance(error, DataError) or transient_cause(error) is not None:
                return self.whereabouts(shard, row.place)
            if corruption(error) is None:
                raise
        return f"{file.path}:{line} (byte {row.place})"

    def whereabouts(self, shard: Shard, place: int) -> str:
        """Return where a row is, without reading."""
        return f"{self.files[shard.file].path} (byte {max(place, shard.start)})"

    def _encoding(self, start: bytes) -> str:
        """Return the codec of a file that begins with the bytes `start`."""
        return encoding_of(start) or self.encoding or "utf-8"

    def _rows(self, shard: Shard) -> Iterator[Row]:
        file = self.files[shard.file]
        place = shard.start
        try:
            with self.open(file) as stream:
                for row in self._read(stream, shard):
                    place = row.place + 1
                    yield row
        except Exception as error:
            flaw = corruption(error)
            if flaw is not None:
                yield Row(place, 0, None, flaw)
            elif isinstance(error, OSError):
                raise DataError(f"{file.path}: cannot be read: {error}") from error
            else:
                raise

    def _read(self, stream: BinaryIO, shard: Shard) -> Iterator[Row]:
        raise NotImplementedError


def _is_utf8(encoding: str) -> bool:
    return codecs.lookup(encoding).name in ("utf-8", "utf-8-sig")
