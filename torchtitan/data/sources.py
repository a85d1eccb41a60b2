"""The interface of a dataset to a lane: shards, the rows of a shard in order, a row's text.

Rows are found first and parsed later, so that skipping rows after a resume costs no parsing. An
unusable row is not an exception while reading but a row with a flaw: one place decides whether it
stops the run or is skipped (`lanes.py`). The sources are in `sources_text.py`, `sources_json.py`,
`sources_parquet.py` and `sources_torch.py` (any `Dataset`, `IterableDataset` or torchdata pipeline,
and Hugging Face's).
"""

import logging
from collections.abc import Iterator, Mapping
from typing import TYPE_CHECKING, Any, NamedTuple, Protocol

import numpy as np

from torchtitan.config import DataError
from torchtitan.data.pieces import Shard

if TYPE_CHECKING:
    from torchtitan.data.document_ends import DocumentTokenizer

logger = logging.getLogger(__name__)

_TOKEN_BYTES = 4


class BadRow(ValueError):
    """A row that gives no text; the message says why.

    `column` names the column that was looked for, if that is the reason.
    """

    def __init__(self, message: str, column: str | None = None):
        super().__init__(message)
        self.column = column


class SkippedRows:
    """The count of unusable rows that were left out, and the rule that allows it."""

    def __init__(self, on_bad_row: str, max_bad_rows: int, count: int = 0):
        self.count = count
        self._may_skip = on_bad_row == "skip"
        self._most = max_bad_rows

    def add(self, message: str) -> None:
        """Leave out a row; `message` says which and why. Raises DataError where rows may not be."""
        if not self._may_skip:
            raise DataError(f'{message}. To leave such rows out, set data.on_bad_row = "skip"')
        self.count += 1
        logger.warning("Left out a row: %s", message)
        if self.count > self._most:
            raise DataError(
                f"left out more rows than data.max_bad_rows = {self._most}; the last one: {message}"
            )


class Row(NamedTuple):
    """A document, or a piece of a long one, that has not been parsed yet."""

    place: int
    """Its first byte (in the decompressed file), or its number."""
    size: int
    """Bytes, about."""
    content: Any
    flaw: str = ""
    """The reason why it cannot be read; empty if it can."""
    begins: bool = True
    """Its first character is the first one of a document. Where it is not, and the row before it
    in a shard that is not shared by stride is not the end of one, it goes on with that."""
    ends: bool = True
    """Its last character is the last one of a document."""

    @property
    def is_whole(self) -> bool:
        """Return whether it is a document, and not a piece of one."""
        return self.begins and self.ends


class Source(Protocol):
    """A dataset. Picklable, for worker processes.

    Four members are optional. `problems()` lists what is wrong with the data as a whole; it is
    asked once, before a run. `num_documents()` counts them for the log, or returns None. And the
    iterator that `rows` returns may have a method `cursor()`: a text from which `rows(shard,
    cursor)` goes on after the rows given so far, by seeking. Without it (or with an empty one) a
    resume goes through the shard's rows again, up to its place. `record(row)` returns the columns
    of a row, for chat data; it raises BadRow.
    """

    description: dict[str, Any]
    """Identifies the data (JSON): a resume with another one is rejected."""

    def shards(self, num_lanes: int) -> list[Shard]:
        """Return the shards of an epoch; a function of the data and `num_lanes` alone."""
        ...

    def rows(self, shard: Shard) -> Iterator[Row]:
        """Yield the rows of a shard, always the same. Raises DataError if they cannot be read."""
        ...

    def text(self, row: Row) -> str | np.ndarray:
        """Return the document of a row, or its tokens (int32), which are taken as they are.

        Empty ones are skipped. Raises BadRow.
        """
        ...

    def locate(self, shard: Shard, row: Row) -> str:
        """Return where a row is, for a message: `file:line (byte n)`."""
        ...


def row_tokens(source: Source, tokenizer: "DocumentTokenizer", row: Row) -> np.ndarray | None:
    """Return a document, int32 `[num_tokens]`; None for an empty one. Raises BadRow.

    Text gets the run's start and end token where the document begins and ends; tokens are taken
    as they are.
    """
    document = source.text(row)
    if isinstance(document, str):
        return tokenizer.encode_document(document, row.begins, row.ends) if document else None
    if len(document) and (highest := int(document.max())) >= tokenizer.vocab_size:
        odd, size = int(document.argmax()), tokenizer.vocab_size
        raise BadRow(f"element {odd}: token {highest} is not one of the tokenizer's {size}")
    return document


def row_record(source: Source, row: Row) -> Mapping[str, Any]:
    """Return the columns of a row. Raises BadRow."""
    if row.flaw:
        raise BadRow(row.flaw)
    item = source.record(row)  # type: ignore[attr-defined]
    if not isinstance(item, Mapping):
        raise BadRow(f"the row holds {kind_of(item)} where columns are expected")
    most: int | None = getattr(source, "max_document_bytes", None)
    if most is not None:
        _check_size(size_of(item), most)
    return item


def size_of(value: Any) -> int:
    """Return about the bytes of a value, by its content alone, as it decides on the order."""
    if isinstance(value, dict):
        return sum(map(size_of, value.values()))
    if isinstance(value, list) and value and not isinstance(value[0], int):
        return sum(map(size_of, value))
    return len(value) if hasattr(value, "__len__") else 0


def read_document(item: Any, column: str, max_bytes: int) -> str | np.ndarray:
    """Return the text or the tokens of an item: its `column`, if it has columns. Raises BadRow."""
    name = None
    what = "the row"
    if isinstance(item, Mapping):
        name, what = column, f"column {column!r}"
        if column not in item:
            columns = ", ".join(repr(key) for key in sorted(map(str, item))) or "none"
            raise BadRow(f"there is no column {column!r}; the columns are {columns}", column)
        item = item[column]
    if isinstance(item, bytes):
        size = len(item)
        try:
            item = item.decode("utf-8") if size <= max_bytes else ""
        except UnicodeDecodeError as error:
            raise BadRow(f"{what} holds invalid UTF-8: {error}") from None
    elif isinstance(item, str):
        try:
            size = len(item.encode("utf-8"))
        except UnicodeEncodeError:
            raise BadRow(f"{what} holds half a UTF-16 pair") from None
    else:
        tokens = _tokens(item, what)
        if tokens is None:
            raise BadRow(f"{what} holds {kind_of(item)} where text is expected", name)
        item, size = tokens, len(tokens) * _TOKEN_BYTES
    _check_size(size, max_bytes)
    return item


def _check_size(size: int, max_bytes: int) -> None:
    if size > max_bytes:
        limit = f"data.max_document_mib ({max_bytes / 2**20:g})"
        raise BadRow(f"the document has {size / 2**20:.3g} MiB, more than {limit}")


def kind_of(item: Any) -> str:
    """Return the kind of an item, in JSON's terms where there is one."""
    names = {dict: "an object", list: "an array", str: "text", bool: "true or false"}
    names |= {type(None): "null", int: "a number", float: "a number"}
    return names.get(type(item), f"a {type(item).__name__}")


def _tokens(item: Any, what: str) -> np.ndarray | None:
    """Return `item` as tokens if it is a list, array or tensor with integers; None otherwise.

    Raises BadRow that names the first element that is not a token.
    """
    if item is None or isinstance(item, bool | int | float | Mapping):
        return None
    try:
        tokens = np.asarray(item)
    except Exception:
        return None
    if tokens.ndim != 1:
        return None
    if tokens.dtype.kind not in "iu" or (isinstance(item, list) and bool in set(map(type, item))):
        # numpy makes numbers of one kind out of a list with one odd element.
        items = list(item)
        if not any(_is_integer(element) for element in items):
            return tokens.astype(np.int32) if not items else None
        odd = next((n for n, element in enumerate(items) if not _is_integer(element)), None)
    else:
        items, odd = tokens, None  # type: ignore[assignment]
    if odd is None:
        odd = next(iter(np.flatnonzero((tokens < 0) | (tokens >= 2**31)).tolist()), None)
    if odd is not None:
        element = "null" if items[odd] is None else str(items[odd])
        raise BadRow(f"{what}: element {odd} is {element} where the number of a token is expected")
    return tokens.astype(np.int32)


def _is_integer(element: Any) -> bool:
    return isinstance(element, int | np.integer) and not isinstance(element, bool)
