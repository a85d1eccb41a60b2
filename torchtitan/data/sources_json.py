"""JSON: objects on lines of their own, or any sequence of values and arrays of them.

Lines are found without being parsed, in any range of bytes. All else that JSON allows (one array,
arrays one after another or in each other, objects over several lines or on one) is read as a
sequence of values, from the front.
"""

import codecs
import io
import itertools
import json
import re
from collections.abc import Iterator, Sequence
from typing import Any, BinaryIO

import numpy as np

from torchtitan.config.schema import Data
from torchtitan.data.decode import corruption, encoding_of, guess_content, guess_format
from torchtitan.data.files import BOM, DataFile, FileSource
from torchtitan.data.pieces import Shard, cut_lines, next_line, piece_size, whole_files
from torchtitan.data.sources import BadRow, Row, kind_of, read_document

_BLANK = b" \t\r\n"
_GAP = re.compile("[\ufeff \t\r\n,\\[\\]]*")  # with the byte-order marks of files put together
_STEPS = {"[": 1, "]": -1}
_DECODER = json.JSONDecoder()
_PART_BYTES = 1 << 16
_LINE_BYTES = 1 << 20


class JsonSource(FileSource):
    """JSON: each object is a row, at whatever depth of arrays; `column` holds the text."""

    def __init__(self, files: Sequence[DataFile], data: Data):
        super().__init__(files, data)
        self.description |= {"kind": "json", "column": data.text_column}
        self.column = data.text_column
        # Escapes make text up to three times as long (\ud83d\ude00 for the four bytes of an emoji),
        # and a row may have other columns.
        self._max_row_bytes = 4 * data.max_document_bytes + 2**20
        self._of_lines: dict[int, bool] = {}

    def shards(self, num_lanes: int) -> list[Shard]:
        """Cut the data into shards for `num_lanes` lanes."""
        lines: list[int] = []
        whole: list[int] = []
        for index, file in enumerate(self.files):
            (lines if self.can_seek(file) and self._has_lines(index) else whole).append(index)
        pieces = cut_lines(self.files, lines, piece_size(self.files, num_lanes))
        if len(pieces) + len(whole) >= num_lanes:
            return pieces + whole_files(whole, 1)
        return whole_files(range(len(self.files)), num_lanes)

    def _encoding(self, start: bytes) -> str:
        # JSON begins with ASCII characters, so the zeros between them tell UTF-16 and UTF-32.
        return encoding_of(start) or self.encoding or json.detect_encoding(start[:4])

    def _rows(self, shard: Shard) -> Iterator[Row]:
        # Before the file is open for its rows: a second decoder would hold a second window.
        if shard.end is None:
            self._has_lines(shard.file)
        yield from super()._rows(shard)

    def _read(self, stream: BinaryIO, shard: Shard) -> Iterator[Row]:
        if shard.end is not None:
            start = next_line(stream, shard.start)
            return read_lines(stream, self._max_row_bytes, start, shard.end)
        if self._has_lines(shard.file):
            return read_lines(stream, self._max_row_bytes, 0, None)
        return read_values(stream, self._max_row_bytes)

    def _has_lines(self, index: int) -> bool:
        """Return whether a file holds one value a line, by its first value."""
        if index not in self._of_lines:
            try:
                self._of_lines[index] = self._starts_with_line(self.files[index])
            except Exception as error:
                if corruption(error) is None:
                    raise
                self._of_lines[index] = True  # reading its rows meets the damage again
        return self._of_lines[index]

    def _starts_with_line(self, file: DataFile) -> bool:
        with self.open(file) as stream:
            line: bytes | None = b"\n"
            while line and line.isspace():
                line, _ = _read_line(stream, self._max_row_bytes)
        found = _is_whole_line(line or b"")
        if found is None:
            with self.open(file) as stream:
                first = next(read_values(stream, self._max_row_bytes), None)
            # A first row that is no JSON, even over several lines, is a row that is damaged.
            found = first is None or bool(first.flaw)
        return found

    def text(self, row: Row) -> str | np.ndarray:
        """Return the text or the tokens of a row. Raises BadRow."""
        return read_document(self.record(row), self.column, self.max_document_bytes)

    def record(self, row: Row) -> dict[str, Any]:
        """Return the object of a row. Raises BadRow."""
        if row.flaw:
            raise BadRow(row.flaw)
        item = row.content if not isinstance(row.content, bytes) else _parse(row)
        if not isinstance(item, dict):
            raise BadRow(f"expected a JSON object, found {kind_of(item)}")
        return item


def _is_whole_line(line: bytes) -> bool | None:
    """Tell by the first line of a file whether it holds one value per line.

    None where that depends on what follows.
    """
    text = line.removeprefix(BOM).strip(_BLANK).decode("utf-8", "replace")
    if text.startswith("["):
        return False
    try:
        _, end = _DECODER.raw_decode(text)
    except (ValueError, RecursionError):
        return None if text.startswith("{") else True
    return not text[end:].lstrip().startswith(("{", "[", ","))


def _read_line(stream: BinaryIO, limit: int) -> tuple[bytes | None, int]:
    """The next line and its size; no line, and what was read of it, from `limit` bytes on."""
    line = stream.readline(min(limit, _LINE_BYTES))
    size = len(line)
    if line.endswith(b"\n") or size < min(limit, _LINE_BYTES):
        return line, size
    parts = [line]
    while size < limit:
        parts.append(stream.readline(min(limit - size, _LINE_BYTES)))
        size += len(parts[-1])
        if not parts[-1] or parts[-1].endswith(b"\n"):
            return b"".join(parts), size
    return None, size


def read_lines(stream: BinaryIO, limit: int, place: int, end: int | None) -> Iterator[Row]:
    """Yield the rows of the non-blank lines that start from byte `place` and before `end`.

    Each line is a row, or holds an array of rows.
    """
    while end is None or place < end:
        line, size = _read_line(stream, limit)
        if size == 0:
            return
        if line is not None and line.startswith(b"{"):
            yield Row(place, size, line)
        elif line is None:
            # At once: what follows may be gigabytes. So long a row fills a shuffle block in any
            # case, so the order does not depend on the limit, which may be changed.
            flaw = f"the row is longer than {limit} bytes (set by data.max_document_mib)"
            yield Row(place, size, None, flaw)
            while (part := stream.readline(_LINE_BYTES)) and not part.endswith(b"\n"):
                size += len(part)
            size += len(part)
        elif line.removeprefix(BOM).lstrip(_BLANK).startswith(b"["):
            for row in read_values(io.BytesIO(line), limit):
                yield row._replace(place=place + row.place)
        elif not line.isspace():
            yield Row(place, size, line)
        place += size


def read_values(stream: BinaryIO, limit: int) -> Iterator[Row]:
    """Yield the values of JSON texts, those in arrays one by one, in bounded memory.

    Invalid JSON ends the file: nothing tells where the next value begins.
    """
    buffer, at, place, depth, at_end = "", 0, 0, 0, False
    decoder = codecs.getincrementaldecoder("utf-8")()
    wrong_bytes = ""
    while True:
        gap = _GAP.match(buffer, at).group()  # type: ignore[union-attr]
        at, place = at + len(gap), place + _num_bytes(gap)
        flaw, cut_short = "", False
        if "[" in gap or "]" in gap:
            steps = (_STEPS.get(mark, 0) for mark in gap)
            depths = list(itertools.accumulate(steps, initial=depth))
            depth = depths[-1]
            if min(depths) < 0:
                flaw = "invalid JSON: `]` where no array is open"
                break
        if at < len(buffer):
            try:
                item, end = _DECODER.raw_decode(buffer, at)
                # At the very end of what was read, a number might go on.
                if end < len(buffer) or at_end:
                    yield Row(place, end - at, item)
                    at, place = end, place + _num_bytes(buffer[at:end])
                    continue
            except json.JSONDecodeError as error:
                where = place + _num_bytes(buffer[at : error.pos])
                flaw = f"invalid JSON: {error.msg} (byte {where})"
                cut_short = error.pos >= len(buffer) or "Unterminated" in error.msg
                # What is wrong near the end may just not be complete yet.
                if error.pos <= len(buffer) - 16 and "Unterminated" not in error.msg:
                    break
            except (ValueError, RecursionError) as error:
                flaw = f"invalid JSON: {_reason(error)}"
                break
            if len(buffer) - at > limit:
                flaw = f"the row is longer than {limit} bytes (set by data.max_document_mib)"
                break
        if at_end:
            if depth and not flaw:
                flaw, cut_short = "an array is not closed", True
            flaw += ", as if the file were cut short" if flaw and cut_short else ""
            break
        part = stream.read(max(_PART_BYTES, len(buffer) - at))
        at_end = not part
        try:
            text = decoder.decode(part, at_end)
        except UnicodeDecodeError as error:
            text, at_end = error.object[: error.start].decode("utf-8"), True
            wrong_bytes = _wrong_bytes(error)
        buffer, at = buffer[at:] + text, 0
    if wrong_bytes or flaw:
        yield Row(place, 0, None, f"{wrong_bytes or flaw}; what follows cannot be read")


def _num_bytes(text: str) -> int:
    return len(text) if text.isascii() else len(text.encode("utf-8"))


def _wrong_bytes(error: UnicodeDecodeError) -> str:
    return f"invalid UTF-8: {error.reason}; {guess_content(error.object)}"


def _parse(row: Row) -> Any:
    content: bytes = row.content.removeprefix(BOM)
    try:
        return json.loads(content.decode("utf-8"))
    except UnicodeDecodeError as error:
        raise BadRow(_wrong_bytes(error)) from None
    except (ValueError, RecursionError) as error:
        reason = guess_format(content) or f"a row must be one line: {_reason(error)}"
        raise BadRow(f"invalid JSON: {reason}") from None


def _reason(error: Exception) -> str:
    return "nested too deeply" if isinstance(error, RecursionError) else str(error)
