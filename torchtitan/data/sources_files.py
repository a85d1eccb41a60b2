"""What sources of files have in common, and text files."""

from collections.abc import Iterator, Sequence
from itertools import islice
from typing import Any, BinaryIO

from torchtitan.config import DataError
from torchtitan.data.files import BOM, DataFile, corruption
from torchtitan.data.pieces import Shard, cut_text, piece_size, relative_names, whole_files
from torchtitan.data.sources import BadRow, Row

_PACKED_TEXT = 64 * 1024


class FileSource:
    """What JSON and text files have in common."""

    def __init__(self, files: Sequence[DataFile], max_document_bytes: int):
        self.files = list(files)
        self.max_document_bytes = max_document_bytes
        sizes = [file.size for file in self.files]
        self.description: dict[str, Any] = {
            "files": [list(item) for item in zip(relative_names(files), sizes, strict=True)]
        }

    def num_bytes(self, shard: Shard) -> int:
        """On the disk, of the bytes or the file that a shard is of."""
        return self.files[shard.file].size if shard.end is None else shard.end - shard.start

    def rows(self, shard: Shard) -> Iterator[Row]:
        rows = self._rows(shard)
        return rows if shard.stride == 1 else islice(rows, shard.offset, None, shard.stride)

    def _rows(self, shard: Shard) -> Iterator[Row]:
        file = self.files[shard.file]
        place = shard.start
        try:
            with file.open() as stream:
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

    def locate(self, shard: Shard, row: Row) -> str:
        return f"{self.files[shard.file].path} (byte {row.place})"

    def _read(self, stream: BinaryIO, shard: Shard) -> Iterator[Row]:
        raise NotImplementedError


class TextSource(FileSource):
    """Text: a file is a document; long files are cut into pieces, each read as a document.

    Bytes that are not UTF-8 become U+FFFD, as editors show them.
    """

    def __init__(self, files: Sequence[DataFile], max_document_bytes: int):
        super().__init__(files, max_document_bytes)
        self.description["kind"] = "text"
        self._packed_size = min(_PACKED_TEXT, max_document_bytes)

    def shards(self, num_lanes: int) -> list[Shard]:
        size = min(piece_size(self.files, num_lanes), self.max_document_bytes)
        plain = [i for i, file in enumerate(self.files) if file.compression is None]
        packed = [i for i, file in enumerate(self.files) if file.compression is not None]
        # Another limit on documents may cut the text anew, and then no place is what it was.
        cuts = {"cut": size if plain else None, "packed_cut": self._packed_size if packed else None}
        self.description |= cuts
        shards = cut_text(self.files, plain, size)
        if len(shards) + len(packed) >= num_lanes:
            return shards + whole_files(packed, 1)
        return shards + whole_files(packed, num_lanes)

    def _read(self, stream: BinaryIO, shard: Shard) -> Iterator[Row]:
        if shard.end is not None:
            stream.seek(shard.start)
            content = stream.read(shard.end - shard.start)
            yield Row(shard.start, len(content), content)
            return
        place = 0
        while content := stream.read(self._packed_size):
            content += stream.readline(1 << 16)
            while stream.peek(1)[:1] and stream.peek(1)[0] & 0xC0 == 0x80:  # type: ignore[attr-defined]
                content += stream.read(1)
            yield Row(place, len(content), content)
            place += len(content)

    def text(self, row: Row) -> str:
        if row.flaw:
            raise BadRow(row.flaw)
        content: bytes = row.content
        if row.place == 0:
            content = content.removeprefix(BOM)
        return content.decode("utf-8", errors="replace")
