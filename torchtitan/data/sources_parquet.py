"""Parquet: a row group is a shard, and a resume seeks to the row group it stopped in.

Where there are far more files than lanes, whole files are the shards, so that only the check
before the start reads every footer. Only the column of the text is read.
"""

import itertools
from collections.abc import Iterator, Sequence
from typing import TYPE_CHECKING, Any

import numpy as np

from torchtitan.config import ConfigIssue, DataError
from torchtitan.config.schema import Data
from torchtitan.data.chat_formats import chat_format
from torchtitan.data.decode import transient_cause
from torchtitan.data.files import KEY, DataFile, relative_names
from torchtitan.data.pieces import PIECES_PER_LANE, Shard, whole_files
from torchtitan.data.sources import BadRow, Row, read_document, size_of

if TYPE_CHECKING:
    from torchtitan.data.listing import Listing

_BUFFER_BYTES = 2**20
_COUNTED_FILES = 256
_BATCH_ROWS = 128
"""Rows that are made Python objects at a time."""


class ParquetSource:
    """Columns of text, or of lists of integers, which are tokens."""

    listing: "Listing | None" = None
    """The result of the search for the files."""

    def __init__(self, files: Sequence[DataFile], data: Data):
        self.files = list(files)
        self.column = data.text_column
        self.max_document_bytes = data.max_document_bytes
        self._chat = chat_format(data)
        self._num_groups: dict[int, int] = {}
        """Row groups with rows, by file; filled by `shards`."""
        sizes = [file.size for file in self.files]
        self.description: dict[str, Any] = {
            "kind": "parquet",
            "column": self.column,
            "files": [list(item) for item in zip(relative_names(files), sizes, strict=True)],
        }

    def problems(self) -> list[ConfigIssue]:
        """Check the footers: unreadable, without the column, or nothing but nulls."""
        problems = []
        num_rows = num_nulls = 0
        for file in self.files:
            try:
                with open_parquet(file) as parquet:
                    flaw = self._flaw(parquet.schema_arrow)
                    num_rows += parquet.metadata.num_rows
                    if not flaw and self._chat is None:
                        num_nulls += _count_nulls(parquet.metadata, self.column)
            except DataError as error:
                problems.append(ConfigIssue(KEY, str(error), "correct or replace the file"))
                continue
            if flaw and self._chat is not None:
                fix = "set data.format to what they hold, or name them in data.columns"
                return [*problems, ConfigIssue("data.format", f"{file.path}: {flaw}", fix)]
            if flaw:
                fix = "set it to the column that holds the text"
                return [*problems, ConfigIssue("data.text_column", f"{file.path}: {flaw}", fix)]
        if not problems and num_rows == 0:
            return [ConfigIssue(KEY, "the files hold no rows", "give data with content")]
        if not problems and num_nulls == num_rows:  # with data.on_bad_row = "skip", too
            text = f"column {self.column!r} is null in all {num_rows} rows"
            fix = "set it to the column that holds the text"
            return [ConfigIssue("data.text_column", text, fix, self.column)]
        return problems

    def shards(self, num_lanes: int) -> list[Shard]:
        """Cut the data into shards for `num_lanes` lanes."""
        if len(self.files) >= PIECES_PER_LANE * num_lanes:
            return [Shard(index) for index in range(len(self.files))]
        groups = []
        for index, file in enumerate(self.files):
            with open_parquet(file) as parquet:
                sizes = _group_sizes(parquet.metadata)
            own = [(index, number) for number, size in enumerate(sizes) if size]
            self._num_groups[index] = len(own)
            groups += own
        shares = whole_files(range(len(groups)), num_lanes)
        return [
            Shard(groups[k][0], groups[k][1], groups[k][1] + 1, share.offset, share.stride)
            for share in shares
            for k in [share.file]
        ]

    def num_bytes(self, shard: Shard) -> int:
        """Return about the bytes on disk of a shard.

        All columns count, and row groups are taken for equal.
        """
        parts = 1 if shard.end is None else self._num_groups[shard.file]
        return self.files[shard.file].size // parts

    def num_documents(self) -> int | None:
        """Return the number of rows; None for many files, whose footers would take long to read."""
        if len(self.files) > _COUNTED_FILES:
            return None
        count = 0
        for file in self.files:
            with open_parquet(file) as parquet:
                count += parquet.metadata.num_rows
        return count

    def rows(self, shard: Shard, cursor: str = "") -> Iterator[Row]:
        """Yield the rows of a shard."""
        return _ParquetRows(self, self.files[shard.file], shard, int(cursor or 0))

    @property
    def is_chat(self) -> bool:
        """Return whether rows are conversations."""
        return self._chat is not None

    def columns(self, schema: Any, path: str) -> list[str]:
        """Return the columns to read. Raises DataError."""
        if flaw := self._flaw(schema):
            raise DataError(f"{path}: {flaw}")
        if self._chat is None:
            return [self.column]
        return [name for name in self._chat.columns if name in schema.names]

    def _flaw(self, schema: Any) -> str:
        if self._chat is None:
            return column_flaw(schema, self.column)
        return self._chat.missing(schema.names)

    def record(self, row: Row) -> dict[str, Any]:
        """Return the columns of a row."""
        content: dict[str, Any] = row.content
        return content

    def text(self, row: Row) -> str | np.ndarray:
        """Return the text or the tokens of a row. Raises BadRow."""
        if row.flaw:
            raise BadRow(row.flaw)
        return read_document({self.column: row.content}, self.column, self.max_document_bytes)

    def locate(self, shard: Shard, row: Row) -> str:
        """Return where a row is, for a message."""
        path = self.files[shard.file].path
        if row.place == 0 and shard.start:  # before any was read
            return f"{path} (the first row of row group {shard.start + 1})"
        return f"{path} (row {row.place + 1})"


class _ParquetRows(Iterator[Row]):
    """The rows of a shard from row `start` of the file on."""

    def __init__(self, source: ParquetSource, file: DataFile, shard: Shard, start: int):
        self._next = start
        """The row of the file that comes next, or one before it that is not of this shard."""
        self._rows = self._read(source, file, shard)

    def __next__(self) -> Row:
        row = next(self._rows)
        self._next = row.place + 1
        return row

    def cursor(self) -> str:
        return str(self._next)

    def _read(self, source: ParquetSource, file: DataFile, shard: Shard) -> Iterator[Row]:
        with open_parquet(file) as parquet:
            columns = source.columns(parquet.schema_arrow, file.path)
            sizes = _group_sizes(parquet.metadata)
            starts = [0, *itertools.accumulate(sizes)]
            groups = range(len(sizes)) if shard.end is None else range(shard.start, shard.end)
            origin = starts[groups.start]
            for group in groups:
                first = starts[group]
                if starts[group + 1] <= self._next:
                    continue
                contents = _contents(file, parquet, group, columns, source.is_chat)
                for place, content in enumerate(contents, first):
                    if place < self._next or (place - origin) % shard.stride != shard.offset:
                        continue
                    if isinstance(content, Row):
                        yield content._replace(place=place)
                    else:
                        yield Row(place, size_of(content), content)


def open_parquet(file: DataFile) -> Any:
    """Return the file as a ParquetFile, its footer read. Raises DataError."""
    import pyarrow.parquet  # type: ignore[import-untyped]

    file.open().close()
    try:
        # With a buffer, pages are read one after another instead of a row group's column at once.
        return pyarrow.parquet.ParquetFile(file.path, buffer_size=_BUFFER_BYTES)
    except (pyarrow.ArrowException, OSError) as error:
        reason = str(error).split("\n")[0]
        raise DataError(f"{file.path}: its Parquet footer cannot be read: {reason}") from error


def column_flaw(schema: Any, column: str) -> str:
    """Return why the column is missing or holds neither text nor tokens; empty if it is fine."""
    import pyarrow

    places = schema.get_all_field_indices(column)
    if len(places) > 1:
        return f"there are {len(places)} columns {column!r}"
    if not places:
        names = ", ".join(repr(name) for name in schema.names) or "none"
        return f"there is no column {column!r}; the columns are {names}"
    kind = schema.field(places[0]).type
    types = pyarrow.types
    if types.is_dictionary(kind):
        kind = kind.value_type
    if types.is_null(kind):
        return f"column {column!r} is null in every row"
    is_text = (
        types.is_string(kind)
        or types.is_large_string(kind)
        or types.is_string_view(kind)
        or types.is_binary(kind)
        or types.is_large_binary(kind)
    )
    is_list = types.is_list(kind) or types.is_large_list(kind) or types.is_fixed_size_list(kind)
    if is_text or (is_list and types.is_integer(kind.value_type)):
        return ""
    texts = [
        field.name
        for field in schema
        if types.is_string(field.type) or types.is_large_string(field.type)
    ]
    hint = f"; the columns of text are {', '.join(map(repr, texts))}" if texts else ""
    return f"column {column!r} holds {kind} where text is expected{hint}"


def _contents(
    file: DataFile, parquet: Any, group: int, columns: list[str], as_dicts: bool
) -> Iterator[bytes | list[int] | dict[str, Any] | Row | None]:
    """Yield the values of a row group: of its column, or `as_dicts` of columns.

    Where it is damaged, the last one is a Row with a flaw.
    """
    import pyarrow

    try:
        batches = parquet.iter_batches(_BATCH_ROWS, [group], columns, use_threads=False)
        for batch in batches:
            if as_dicts:
                yield from _dicts(batch)
                continue
            values = batch.column(0)
            if pyarrow.types.is_dictionary(values.type):
                values = values.dictionary_decode()
            # As bytes: what is not UTF-8 must be a flaw of its row, not of the whole batch.
            if pyarrow.types.is_large_string(values.type):
                values = values.cast(pyarrow.large_binary())
            elif pyarrow.types.is_string(values.type) or pyarrow.types.is_string_view(values.type):
                values = values.cast(pyarrow.binary())
            yield from values.to_pylist()
    except (pyarrow.ArrowException, OSError) as error:
        if transient_cause(error) is not None or (isinstance(error, OSError) and error.errno):
            raise DataError(f"{file.path}: cannot be read: {error}") from error
        reason = str(error).split("\n")[0]
        yield Row(0, 0, None, f"row group {group} is damaged ({reason})")


def _dicts(batch: Any) -> Iterator[dict[str, Any] | Row]:
    try:
        yield from batch.to_pylist()
    except UnicodeDecodeError:  # of some row
        for index in range(batch.num_rows):
            try:
                yield from batch.slice(index, 1).to_pylist()
            except UnicodeDecodeError as error:
                yield Row(0, 0, None, f"a column holds invalid UTF-8: {error}")


def _group_sizes(metadata: Any) -> list[int]:
    return [metadata.row_group(group).num_rows for group in range(metadata.num_row_groups)]


def _count_nulls(metadata: Any, column: str) -> int:
    """Count the rows whose column is null by the statistics, which not every file has."""
    count = 0
    for group in range(metadata.num_row_groups):
        chunks = map(metadata.row_group(group).column, range(metadata.num_columns))
        statistics = [chunk.statistics for chunk in chunks if chunk.path_in_schema == column]
        count += sum(found.null_count or 0 for found in statistics if found is not None)
    return count
