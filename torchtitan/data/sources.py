"""What a dataset is to a lane: shards, the rows of a shard in order, and the text of a row.

Rows are found first and parsed later, so that passing over rows after a resume costs no parsing. A
row that cannot be used is not an exception while reading but a row with a flaw: whether it stops
the run or is left out is decided in one place (`lanes.py`).
"""

import codecs
import json
import re
from collections.abc import Iterator, Sequence
from itertools import islice
from typing import Any, BinaryIO, NamedTuple, Protocol, runtime_checkable

import numpy as np

from torchtitan.config import DataError
from torchtitan.data.files import DataFile, corruption
from torchtitan.data.pieces import (
    Shard,
    cut_lines,
    cut_text,
    next_line,
    piece_size,
    relative_names,
    whole_files,
)

_BOM = codecs.BOM_UTF8
_BLANK = b" \t\r\n"
_GAP = re.compile(r"[\s,]*")
_PACKED_TEXT = 64 * 1024


class BadRow(ValueError):
    """A row that gives no text; the message says why.

    `column` names the column that was looked for, if that is the reason.
    """

    def __init__(self, message: str, column: str | None = None):
        super().__init__(message)
        self.column = column


class Row(NamedTuple):
    """A document that has not been parsed yet."""

    place: int
    """Where it is: its first byte (in the decompressed file), or its number in a JSON array."""
    size: int
    """Bytes, about."""
    content: Any
    flaw: str = ""
    """Why it cannot be read, if so."""


class Source(Protocol):
    """A dataset. Picklable, for reading processes."""

    description: dict[str, Any]
    """What identifies the data (JSON): a resume refuses another one."""

    def shards(self, num_lanes: int) -> list[Shard]:
        """The shards of an epoch; a function of the data and `num_lanes` alone."""
        ...

    def rows(self, shard: Shard) -> Iterator[Row]:
        """The rows of a shard, always the same. Raises DataError if the file has changed."""
        ...

    def text(self, row: Row) -> str:
        """The document of a row; empty ones are passed over. Raises BadRow."""
        ...

    def locate(self, shard: Shard, row: Row) -> str:
        """Where a row is, for a message: `file:line (byte n)`."""
        ...


@runtime_checkable
class HasTokens(Protocol):
    """A source of documents that have been tokenised before."""

    def tokens(self, row: Row) -> np.ndarray:
        """A document between its start and end token, int32 `[num_tokens]`. Raises DataError."""
        ...


class FileSource:
    """What JSON and text files have in common."""

    def __init__(self, files: Sequence[DataFile], max_document_bytes: int):
        self.files = list(files)
        self.max_document_bytes = max_document_bytes
        sizes = [file.size for file in self.files]
        self.description: dict[str, Any] = {
            "files": [list(item) for item in zip(relative_names(files), sizes, strict=True)]
        }

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

    def shards(self, num_lanes: int) -> list[Shard]:
        size = min(piece_size(self.files, num_lanes), self.max_document_bytes)
        plain = [i for i, file in enumerate(self.files) if file.compression is None]
        packed = [i for i, file in enumerate(self.files) if file.compression is not None]
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
        while content := stream.read(min(_PACKED_TEXT, self.max_document_bytes)):
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
            content = content.removeprefix(_BOM)
        return content.decode("utf-8", errors="replace")


class JsonSource(FileSource):
    """JSON: a row an object, one on each line, or all in one array; `column` holds the text."""

    def __init__(self, files: Sequence[DataFile], max_document_bytes: int, column: str):
        super().__init__(files, max_document_bytes)
        self.description |= {"kind": "json", "column": column}
        self.column = column
        # A byte of text is at most six in JSON (\u0000), and a row may have other columns.
        self._max_row_bytes = 8 * max_document_bytes + 2**20

    def shards(self, num_lanes: int) -> list[Shard]:
        lines: list[int] = []
        whole: list[int] = []
        for index, file in enumerate(self.files):
            (whole if file.compression or _starts_array(file) else lines).append(index)
        pieces = cut_lines(self.files, lines, piece_size(self.files, num_lanes))
        if len(pieces) + len(whole) >= num_lanes:
            return pieces + whole_files(whole, 1)
        return whole_files(range(len(self.files)), num_lanes)

    def _read(self, stream: BinaryIO, shard: Shard) -> Iterator[Row]:
        if shard.end is not None:
            start = next_line(stream, shard.start)
            return read_lines(stream, self._max_row_bytes, start, shard.end)
        if is_array(stream):
            return read_array(stream, self._max_row_bytes)
        return read_lines(stream, self._max_row_bytes, 0, None)

    def text(self, row: Row) -> str:
        if row.flaw:
            raise BadRow(row.flaw)
        item = row.content if not isinstance(row.content, bytes) else _parse(row)
        if not isinstance(item, dict):
            raise BadRow(f"expected a JSON object, found {_type_name(item)}")
        if self.column not in item:
            columns = ", ".join(repr(name) for name in sorted(item)) or "none"
            message = f"there is no column {self.column!r}; the columns are {columns}"
            raise BadRow(message, self.column)
        text = item[self.column]
        if not isinstance(text, str):
            message = f"column {self.column!r} holds {_type_name(text)} where text is expected"
            raise BadRow(message, self.column)
        try:
            size = len(text.encode("utf-8"))
        except UnicodeEncodeError:
            raise BadRow(f"column {self.column!r} holds half a UTF-16 pair") from None
        if size > self.max_document_bytes:
            limit = f"data.max_document_mib ({self.max_document_bytes / 2**20:g})"
            raise BadRow(f"the document has {size / 2**20:.3g} MiB, more than {limit}")
        return text

    def locate(self, shard: Shard, row: Row) -> str:
        file = self.files[shard.file]
        line, left = 1, row.place
        try:
            with file.open() as stream:
                if shard.end is None and is_array(stream):
                    return f"{file.path} (element {row.place + 1})"
                while left > 0 and (part := stream.read(min(left, 1 << 20))):
                    line += part.count(b"\n")
                    left -= len(part)
        except Exception as error:
            if corruption(error) is None:
                raise
        return f"{file.path}:{line} (byte {row.place})"


def read_lines(stream: BinaryIO, limit: int, place: int, end: int | None) -> Iterator[Row]:
    """The non-blank lines that start at byte `place` or later and before `end`."""
    while end is None or place < end:
        line = stream.readline(limit)
        size = len(line)
        flaw = ""
        while size >= limit and line and not line.endswith(b"\n"):
            line = stream.readline(limit)
            size += len(line)
            flaw = f"the row is longer than {limit} bytes (set by data.max_document_mib)"
        if size == 0:
            return
        if flaw:
            yield Row(place, 0, None, flaw)
        elif not line.isspace():
            yield Row(place, size, line)
        place += size


def is_array(stream: BinaryIO) -> bool:
    """Whether the content, at its start, is a JSON array. The stream must allow to peek."""
    start = stream.peek(1 << 12)  # type: ignore[attr-defined]
    return bool(start.removeprefix(_BOM).lstrip(_BLANK)[:1] == b"[")


def _starts_array(file: DataFile) -> bool:
    with file.open() as stream:
        return is_array(stream)


def read_array(stream: BinaryIO, limit: int) -> Iterator[Row]:
    """The elements of a JSON array (see `is_array`), one after another in bounded memory.

    An element that is not valid JSON ends the array: nothing tells where the next one begins.
    """
    decode_bytes = codecs.getincrementaldecoder("utf-8-sig")().decode
    decode_json = json.JSONDecoder().raw_decode
    buffer, at, number, at_end = "[", 1, 0, False
    stream.read(stream.peek(1).index(b"[") + 1)  # type: ignore[attr-defined]
    while True:
        at = _GAP.match(buffer, at).end()  # type: ignore[union-attr]
        if buffer[at : at + 1] == "]":
            return
        flaw = ""
        try:
            item, end = decode_json(buffer, at)
            # At the very end of what was read, a number might go on.
            if end < len(buffer) or at_end:
                yield Row(number, end - at, item)
                at, number = end, number + 1
                continue
        except (ValueError, RecursionError) as error:
            flaw = f"the array holds invalid JSON: {error}"
            # What is wrong near the end may just not be complete yet.
            near_end = getattr(error, "pos", 0) > len(buffer) - 16 or "Unterminated" in flaw
            if not near_end or len(buffer) - at > limit:
                break
        if at_end:
            flaw = "the array is not closed; the file may be cut short"
            break
        part = stream.read(max(1 << 16, len(buffer) - at))
        at_end = not part
        try:
            buffer, at = buffer[at:] + decode_bytes(part, at_end), 0
        except UnicodeDecodeError as error:
            flaw = f"the array holds invalid UTF-8: {error}"
            break
    yield Row(number, 0, None, flaw)


def _parse(row: Row) -> Any:
    content: bytes = row.content.removeprefix(_BOM) if row.place == 0 else row.content
    try:
        return json.loads(content.decode("utf-8"))
    except UnicodeDecodeError as error:
        raise BadRow(f"invalid UTF-8: {error}") from None
    except RecursionError:
        raise BadRow("invalid JSON: nested too deeply") from None
    except ValueError as error:
        raise BadRow(f"invalid JSON (a row must be one line): {error}") from None


def _type_name(item: Any) -> str:
    names = {dict: "an object", list: "an array", str: "text", bool: "true or false"}
    return "null" if item is None else names.get(type(item), "a number")
