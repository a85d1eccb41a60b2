"""Cutting a dataset into shards that lanes read independently.

Plain text and JSON lines are cut into byte ranges, so that a position is found by one seek and so
that there is always enough to deal out. A compressed file, one in another encoding than UTF-8 and
JSON in arrays can only be read from the front. Such a file is one shard, or, where there are fewer
shards than lanes, several that share out its rows by stride (each of which reads the whole file and
parses its own rows). How data are cut depends on the data and the number of lanes alone, never on
the mesh.
"""

import itertools
from collections.abc import Callable, Sequence
from functools import partial
from typing import TYPE_CHECKING, BinaryIO, NamedTuple

from torchtitan.config import ConfigIssue
from torchtitan.utils.text import plural

if TYPE_CHECKING:
    from torchtitan.data.files import DataFile

PIECES_PER_LANE = 16
SMALLEST_PIECE = 4 * 1024
LARGEST_PIECE = 4 * 1024 * 1024
LARGEST_TEXT_PIECE = 64 * 1024 * 1024
_TEXT_PIECES_PER_LANE = 4
"""Fewer than of rows: each is a place where a document is cut."""
_EAGER_PIECES = 16384
_NEAR, _WINDOW = 4 * 1024, 64 * 1024


class Shard(NamedTuple):
    """The part of the data that one lane reads from front to back in an epoch.

    Either the bytes `[start, end)` of an uncompressed file, or (`end` is None) the rows
    `offset`, `offset + stride`, ... of a whole file.
    """

    file: int
    """Index into the source's files."""
    start: int = 0
    end: int | None = None
    offset: int = 0
    stride: int = 1


def piece_size(files: "Sequence[DataFile]", num_lanes: int) -> int:
    """Return the bytes to aim at for a piece."""
    total = sum(file.size for file in files)
    return min(max(total // (PIECES_PER_LANE * num_lanes), SMALLEST_PIECE), LARGEST_PIECE)


def text_piece_size(files: "Sequence[DataFile]", num_lanes: int) -> int:
    """Return the bytes to aim at for a piece of a text file; as few pieces as lanes need."""
    if num_lanes == 1:
        return LARGEST_TEXT_PIECE
    share = sum(file.size for file in files) // (_TEXT_PIECES_PER_LANE * num_lanes)
    return min(max(share, SMALLEST_PIECE), LARGEST_TEXT_PIECE)


def whole_files(indices: Sequence[int], num_lanes: int) -> list[Shard]:
    """Return shards of files that can only be read from the front.

    With too few files the lanes share them by stride: the smallest one that gives every lane
    the same number of shards, or so many that one more or less hardly matters.
    """
    count = len(indices)
    if count == 0:
        return []
    stride = 1
    if count < num_lanes:
        stride = -(-num_lanes // count)
        while count * stride % num_lanes and count * stride < PIECES_PER_LANE * num_lanes:
            stride += 1
    return [Shard(index, offset=k, stride=stride) for index in indices for k in range(stride)]


def cut_lines(files: "Sequence[DataFile]", indices: Sequence[int], size: int) -> list[Shard]:
    """Split files of lines into byte ranges, each with the lines that start in it.

    For all but huge datasets the borders are moved to line starts here, so no range is without
    a line; in huge ones a range is as large as can be and hardly ever empty.
    """
    cuts = _even_cuts(files, indices, size)
    eager = sum(len(own) - 1 for own in cuts.values()) <= _EAGER_PIECES
    return _ranges(files, cuts, next_line if eager else None)


def cut_text(
    files: "Sequence[DataFile]", indices: Sequence[int], size: int, separator: bytes
) -> list[Shard]:
    """Split text files into byte ranges, between documents where there is a separator.

    Otherwise they are split at line ends, at blanks where there are none, or between
    characters.
    """

    align: Callable[[BinaryIO, int], int] = _next_cut
    if separator:
        align = partial(_next_document, separator=separator)
    return _ranges(files, _even_cuts(files, indices, size), align)


def _even_cuts(
    files: "Sequence[DataFile]", indices: Sequence[int], piece: int
) -> dict[int, list[int]]:
    """Return where to cut each file into about equal pieces: its beginning, borders and end."""
    cuts = {}
    for index in indices:
        size = files[index].size
        count = max(1, round(size / piece))
        cuts[index] = [size * k // count for k in range(count + 1)]
    return cuts


def _ranges(
    files: "Sequence[DataFile]",
    cuts: dict[int, list[int]],
    align: Callable[[BinaryIO, int], int] | None,
) -> list[Shard]:
    """Return the shards between the cuts, each of which `align` moves to a better place."""
    shards = []
    for index, borders in cuts.items():
        if align is not None and len(borders) > 2:
            with files[index].open() as stream:
                borders = _distinct(borders, partial(align, stream))
        shards += [Shard(index, a, b) for a, b in itertools.pairwise(borders)]
    return shards


def next_line(stream: BinaryIO, start: int) -> int:
    """Find the first line that starts at byte `start` or later; leaves the stream there."""
    if start == 0:
        stream.seek(0)
        return 0
    stream.seek(start - 1)
    while part := stream.readline(_WINDOW):
        if part.endswith(b"\n"):
            break
    return stream.tell()


def _next_cut(stream: BinaryIO, start: int) -> int:
    window = b""
    for size in (_NEAR, _WINDOW):  # most text has a line end near by, and huge data many cuts
        stream.seek(start)
        window = stream.read(size)
        if b"\n" in window:
            break
    return start + text_cut(window)


def text_cut(window: bytes) -> int:
    """Return where to split text: after the first line end, else the first blank.

    Without either it is split before the first character.
    """
    for mark in (b"\n", b" "):
        if (found := window.find(mark)) >= 0:
            return found + 1
    # Bytes of the form 10xxxxxx continue a character.
    skipped = 0
    while skipped < min(len(window), 3) and window[skipped] & 0xC0 == 0x80:
        skipped += 1
    return skipped


def _next_document(stream: BinaryIO, start: int, separator: bytes) -> int:
    """Return the start of the first document at or after byte `start`, or the end of the file."""
    place = max(0, start - len(separator))
    stream.seek(place)
    buffer = b""
    while part := stream.read(_WINDOW):
        buffer += part
        found = buffer.find(separator)
        # Separators may follow it, or overlap it, for which the next part is needed.
        if found >= 0 and len(buffer) > found + _WINDOW // 2:
            break
        if found < 0:
            place += max(0, len(buffer) - len(separator))
            buffer = buffer[-len(separator) :]
    found = buffer.find(separator)
    return place + (len(buffer) if found < 0 else end_of_separators(buffer, found, separator))


def end_of_separators(content: bytes, place: int, separator: bytes) -> int:
    """Return where the separators that begin at `place`, and touch or overlap each other, end."""
    size = len(separator)
    while (found := content.find(separator, place + 1, place + 2 * size)) >= 0:
        place = found
    return place + size


def _distinct(cuts: list[int], align: Callable[[int], int]) -> list[int]:
    """Return `cuts` with the inner ones aligned, without duplicates."""
    size = cuts[-1]
    aligned = [0]
    for cut in cuts[1:-1]:
        # A line longer than a piece was passed over already: do not search it again.
        place = aligned[-1] if cut <= aligned[-1] else align(cut)
        if place >= size:  # nothing was found up to the end: do not search it again either
            break
        if place > aligned[-1]:
            aligned.append(place)
    return [*aligned, size]


def too_few_shards(
    num_shards: int, num_lanes: int, set_lanes: int | None, unit: str = "part"
) -> ConfigIssue:
    """Return the problem of data that cannot be dealt to all lanes."""
    return ConfigIssue(
        "data.lanes",
        f"the data give {plural(num_shards, unit)}, too few for {plural(num_lanes, 'lane')}",
        f"set data.lanes to at most {num_shards}, or give more data",
        value=set_lanes,
    )
