"""Text: a file is a document, or several with a separator between them.

Long documents are read in pieces. Only the first piece of a document gets a start token and only
the last one an end token; pieces that a lane reads one after another are one document to it. Where
lanes share a file, a lane's part of a document begins and ends without such a token.
"""

from collections.abc import Iterator, Sequence
from typing import BinaryIO

from torchtitan.config.schema import Data
from torchtitan.data.decode import guess_content
from torchtitan.data.files import BOM, DataFile, FileSource
from torchtitan.data.pieces import (
    SMALLEST_PIECE,
    Shard,
    cut_text,
    end_of_separators,
    text_cut,
    text_piece_size,
    whole_files,
)
from torchtitan.data.sources import BadRow, Row

_PIECE_BYTES = 2**17
_LEAST_ZEROS = 1 / 64
"""Share of a text from which on its zeros are those of UTF-16; a few occur in any text."""


class TextSource(FileSource):
    """Text files."""

    def __init__(self, files: Sequence[DataFile], data: Data):
        super().__init__(files, data)
        self._separator = (data.document_separator or "").encode("utf-8")
        # A lane's position counts pieces, so it depends on their size.
        self.description |= {"kind": "text", "pieces": _PIECE_BYTES}
        if self._separator:
            self.description["separator"] = data.document_separator

    def shards(self, num_lanes: int) -> list[Shard]:
        """Cut the data into shards for `num_lanes` lanes."""
        plain = [index for index, file in enumerate(self.files) if self.can_seek(file)]
        front = [index for index, file in enumerate(self.files) if not self.can_seek(file)]
        size = text_piece_size(self.files, num_lanes)
        shards = cut_text(self.files, plain, size, self._separator)
        if len(shards) + len(front) >= num_lanes:
            return shards + whole_files(front, 1)
        return shards + whole_files(front, num_lanes)

    def _read(self, stream: BinaryIO, shard: Shard) -> Iterator[Row]:
        if shard.end is not None:
            stream.seek(shard.start)
            ends = bool(self._separator) or shard.end == self.files[shard.file].size
            return read_text(stream, shard.start, shard.end, _PIECE_BYTES, self._separator, ends)
        size = _PIECE_BYTES
        if shard.stride > 1:  # so that small files have something for every lane
            share = self.files[shard.file].size // (4 * shard.stride)
            size = min(max(share, SMALLEST_PIECE), _PIECE_BYTES)
        return read_text(stream, 0, None, size, self._separator)

    def text(self, row: Row) -> str:
        """Return the text or the tokens of a row. Raises BadRow."""
        if row.flaw:
            raise BadRow(row.flaw)
        content: bytes = row.content
        if row.place == 0:
            content = content.removeprefix(BOM)
        if content.count(0) > _LEAST_ZEROS * len(content):
            raise BadRow(f"not text: {guess_content(content)}")
        try:
            return content.decode("utf-8")
        except UnicodeDecodeError as error:
            where = f"byte 0x{content[error.start]:02x} at {row.place + error.start}"
            raise BadRow(f"not UTF-8 ({where}): {guess_content(content)}") from None


def read_text(
    stream: BinaryIO, place: int, end: int | None, size: int, separator: bytes, ends: bool = True
) -> Iterator[Row]:
    """Yield the documents from byte `place`, where `stream` is, to `end`, in pieces.

    `end` may be None for the end of the stream; `size` is about the bytes of a piece; `ends`
    says whether a document ends there. A separator is any run of bytes that `separator` covers,
    so it does not matter from where one looks for it. Blank documents are skipped.
    """
    buffer, at, at_end = b"", 0, False
    begins = place == 0 or bool(separator)
    limit = size + size // 2
    while True:
        if not at_end and len(buffer) - at <= limit + size:
            left = None if end is None else end - place - (len(buffer) - at)
            part = stream.read(4 * limit if left is None else min(4 * limit, left))
            buffer, at, at_end = buffer[at:] + part, 0, not part
            continue
        found = buffer.find(separator, at, at + limit + len(separator)) if separator else -1
        if found >= 0:
            stop, finished = found, True
            next_one = end_of_separators(buffer, found, separator)
        elif at_end and len(buffer) - at <= limit:
            stop = next_one = len(buffer)
            finished = ends
        else:
            stop = next_one = at + size + text_cut(buffer[at + size : at + limit])
            finished = False
        content = buffer[at:stop]
        if content and not (begins and finished and content.isspace()):
            yield Row(place, len(content), content, begins=begins, ends=finished)
        begins = finished
        at, place = next_one, place + next_one - at
        if at_end and at == len(buffer):
            return
