"""What JSON and text files have in common: their bytes, and a flaw where a file is damaged."""

import codecs
import logging
from collections.abc import Iterator, Mapping, Sequence
from itertools import islice
from typing import Any, BinaryIO

from torchtitan.config import DataError
from torchtitan.config.schema import Data
from torchtitan.data.decode import corruption, encoding_of, transcoded
from torchtitan.data.files import DataFile
from torchtitan.data.listing import LeftOut
from torchtitan.data.pieces import Shard, relative_names
from torchtitan.data.sources import Row

logger = logging.getLogger(__name__)


class FileSource:
    """Files that are read as UTF-8, whatever their compression and encoding."""

    left_out: Mapping[str, LeftOut] = {}
    """Files that were found and are not read, by reason."""
    doubles: Sequence[tuple[str, str]] = ()
    """Files that seem to hold the same."""

    def __init__(self, files: Sequence[DataFile], data: Data):
        self.files = list(files)
        self.encoding = data.encoding
        self.max_document_bytes = data.max_document_bytes
        self._max_window_bytes = data.max_zstd_window_mib * 2**20
        self._noticed = False
        sizes = [file.size for file in self.files]
        self.description: dict[str, Any] = {
            "files": [list(item) for item in zip(relative_names(files), sizes, strict=True)]
        }
        if data.encoding is not None:
            self.description["encoding"] = data.encoding

    def num_bytes(self, shard: Shard) -> int:
        """On the disk, of the bytes or the file that a shard is of."""
        return self.files[shard.file].size if shard.end is None else shard.end - shard.start

    def rows(self, shard: Shard) -> Iterator[Row]:
        rows = self._rows(shard)
        return rows if shard.stride == 1 else islice(rows, shard.offset, None, shard.stride)

    def open(self, file: DataFile) -> BinaryIO:
        """The content in UTF-8. Raises DataError."""
        stream = file.open(self._max_window_bytes)
        try:
            start = file.start if file.compression is None else stream.peek(4)  # type: ignore[attr-defined]
        except BaseException:
            stream.close()
            raise
        encoding = self._encoding(start)
        if _is_utf8(encoding):
            return stream
        if encoding != self.encoding and not self._noticed:
            self._noticed = True
            logger.info(
                "%s is decoded from %s, which its first bytes name", file.path, encoding.upper()
            )
        return transcoded(stream, encoding)

    def can_seek(self, file: DataFile) -> bool:
        """Return whether bytes of the content lie at the same places on disk. Raises DataError."""
        return file.compression is None and _is_utf8(self._encoding(file.start))

    def locate(self, shard: Shard, row: Row) -> str:
        file = self.files[shard.file]
        line, left = 1, row.place
        try:
            with self.open(file) as stream:
                while left > 0 and (part := stream.read(min(left, 1 << 20))):
                    line += part.count(b"\n")
                    left -= len(part)
        except Exception as error:
            if corruption(error) is None:
                raise
        return f"{file.path}:{line} (byte {row.place})"

    def _encoding(self, start: bytes) -> str:
        """The codec of a file that begins with the bytes `start`."""
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
