"""JSON: objects on lines of their own, or all in one array."""

import codecs
import json
import re
from collections.abc import Iterator, Sequence
from typing import Any, BinaryIO

import numpy as np

from torchtitan.data.files import BOM, DataFile, corruption
from torchtitan.data.pieces import Shard, cut_lines, next_line, piece_size, whole_files
from torchtitan.data.sources import BadRow, Row, kind_of, read_document
from torchtitan.data.sources_files import FileSource

_BLANK = b" \t\r\n"
_GAP = re.compile(r"[\s,]*")


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

    def text(self, row: Row) -> str | np.ndarray:
        if row.flaw:
            raise BadRow(row.flaw)
        item = row.content if not isinstance(row.content, bytes) else _parse(row)
        if not isinstance(item, dict):
            raise BadRow(f"expected a JSON object, found {kind_of(item)}")
        return read_document(item, self.column, self.max_document_bytes)

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
        if flaw:  # with its size, as blocks must not depend on the limit, which may be set anew
            yield Row(place, size, None, flaw)
        elif not line.isspace():
            yield Row(place, size, line)
        place += size


def is_array(stream: BinaryIO) -> bool:
    """Whether the content, at its start, is a JSON array. The stream must allow to peek."""
    start = stream.peek(1 << 12)  # type: ignore[attr-defined]
    return bool(start.removeprefix(BOM).lstrip(_BLANK)[:1] == b"[")


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
    content: bytes = row.content.removeprefix(BOM) if row.place == 0 else row.content
    try:
        return json.loads(content.decode("utf-8"))
    except UnicodeDecodeError as error:
        raise BadRow(f"invalid UTF-8: {error}") from None
    except RecursionError:
        raise BadRow("invalid JSON: nested too deeply") from None
    except ValueError as error:
        raise BadRow(f"invalid JSON (a row must be one line): {error}") from None
