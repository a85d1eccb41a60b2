"""Any `torch.utils.data.Dataset` or `IterableDataset`, and those of Hugging Face, as sources.

A map-style dataset is read by index, so the order is ours and a resume goes straight to its place.
An iterable one is read from its front: its own `state_dict` and `load_state_dict` are used where it
has them, else a resume reads it again and passes over what was used. What gives equal rows on every
pass is all that is asked of a dataset; it must not shuffle, or cut itself up by rank or worker.
"""

import copy
import importlib.metadata
import json
from collections.abc import Callable, Iterator, Sequence
from itertools import islice
from typing import Any

import numpy as np

from torchtitan.config import ConfigError, ConfigIssue, DataError
from torchtitan.data.files import DataFile
from torchtitan.data.pieces import PIECES_PER_LANE, Shard, whole_files
from torchtitan.data.sources import BadRow, Row, Source, read_document

_RANGE_ROWS = 1024
_MOST_RANGES = 2**16


class _DatasetSource:
    """What both kinds hold; `description` is what else a resume must find unchanged."""

    kind: str
    files: Sequence[DataFile] = ()
    """Those on this machine, where they are known."""

    def __init__(
        self, dataset: Any, name: str, column: str, max_document_bytes: int, **description: Any
    ):
        self.dataset = dataset
        self.name = name
        self.column = column
        self.max_document_bytes = max_document_bytes
        self.description: dict[str, Any] = {
            "kind": self.kind,
            "name": name,
            "column": column,
            **description,
        }


class MapSource(_DatasetSource):
    """A dataset with `len` and `[index]`; ranges of consecutive indices are the shards."""

    kind = "map"

    def __init__(self, dataset: Any, *args: Any, **description: Any):
        super().__init__(dataset, *args, rows=len(dataset), **description)

    def shards(self, num_lanes: int) -> list[Shard]:
        num_rows = len(self.dataset)
        size = min(num_rows // (PIECES_PER_LANE * num_lanes), _RANGE_ROWS)
        size = max(size, num_rows // _MOST_RANGES, 1)
        starts = range(0, num_rows, size)
        return [Shard(0, start, min(start + size, num_rows)) for start in starts]

    def rows(self, shard: Shard) -> Iterator[Row]:
        assert shard.end is not None
        for index in range(shard.start, shard.end):
            yield Row(index, 0, None)

    def text(self, row: Row) -> str | np.ndarray:
        try:
            item = self.dataset[row.place]
        except Exception as error:
            raise BadRow(f"reading it failed: {in_short(error)}") from error
        return read_document(item, self.column, self.max_document_bytes)

    def locate(self, shard: Shard, row: Row) -> str:
        return f"{self.name}[{row.place}]"


class StreamSource(_DatasetSource):
    """A dataset that is iterated over.

    Its parts are the shards if it has `num_shards` and `shard(num_shards, index)`, as those of
    Hugging Face have; else, or where there are fewer parts than lanes, rows by stride.
    """

    kind = "stream"

    def __init__(self, dataset: Any, *args: Any, **description: Any):
        super().__init__(dataset, *args, **description)
        self._parted = dataset
        """The dataset, cut up further where that was needed and can be done."""

    def problems(self) -> list[ConfigIssue]:
        """Try out on three rows that a second resume goes on where it was stopped, too."""
        part = self._part(0)
        if not _can_seek(part):
            return []
        flaw = _resume_flaw(lambda: self._part(0), self.name)
        if not flaw:
            return []
        fix = "mend its state_dict and load_state_dict, or remove both: a resume then reads again"
        if type(part).__module__.partition(".")[0] == "datasets":
            version = importlib.metadata.version("datasets")
            fix = f"install another version of the library `datasets` than {version}"
        return [
            ConfigIssue("training.dataset", f"a resume would go astray: {flaw}", fix, self.name)
        ]

    def shards(self, num_lanes: int) -> list[Shard]:
        self._parted = self.dataset
        if self._num_parts() < num_lanes and hasattr(self.dataset, "reshard"):
            self._parted = self.dataset.reshard()
        self.description["parts"] = self._num_parts()
        return whole_files(range(self._num_parts()), num_lanes)

    def rows(self, shard: Shard, cursor: str = "") -> Iterator[Row]:
        return _StreamRows(self._part(shard.file), self.name, shard, cursor)

    def text(self, row: Row) -> str | np.ndarray:
        return read_document(row.content, self.column, self.max_document_bytes)

    def locate(self, shard: Shard, row: Row) -> str:
        part = f", part {shard.file + 1} of {self._num_parts()}" if self._num_parts() > 1 else ""
        return f"{self.name}{part} (row {row.place + 1})"

    def _num_parts(self) -> int:
        return int(self._parted.num_shards) if _has_parts(self._parted) else 1

    def _part(self, index: int) -> Any:
        if _has_parts(self._parted):
            return self._parted.shard(num_shards=self._num_parts(), index=index)
        # Where a dataset has a state it is in the object, and every lane needs one of its own.
        return copy.deepcopy(self._parted) if _has_state(self._parted) else self._parted


class _StreamRows(Iterator[Row]):
    """The rows of a shard, after those that `cursor` says were read."""

    def __init__(self, dataset: Any, name: str, shard: Shard, cursor: str):
        self._dataset = dataset
        self._name = name
        self._shard = shard
        self._can_seek = _can_seek(dataset)
        self._num_read = 0
        """Rows of the part that were read, whether of this shard or not."""
        if cursor:
            stored = json.loads(cursor)
            self._num_read = stored["rows"]
            self._protect(dataset.load_state_dict, stored["state"])
        self._items = self._protect(iter, dataset)

    def __next__(self) -> Row:
        while True:
            item = self._protect(next, self._items)
            place = self._num_read
            self._num_read += 1
            if place % self._shard.stride == self._shard.offset:
                return Row(place, _size(item, 0), item)

    def cursor(self) -> str:
        if not self._can_seek:
            return ""
        state = self._protect(self._dataset.state_dict)
        try:
            text = json.dumps({"rows": self._num_read, "state": state})
            kept = json.loads(text)["state"] == state
        except (TypeError, ValueError):
            kept = False
        if not kept:
            raise DataError(
                f"{self._name}: its state_dict() is stored as JSON, so it may hold only texts,"
                " numbers, True, False, None, lists, and dicts with texts as keys"
            )
        return text

    def _protect(self, function: Any, *arguments: Any) -> Any:
        try:
            return function(*arguments)
        except StopIteration:
            raise
        except Exception as error:
            message = f"{self._name}: reading failed after {self._num_read} rows"
            raise DataError(f"{message}: {in_short(error)}") from error


def _resume_flaw(again: Callable[[], Any], name: str) -> str:
    """What is wrong with the state of a dataset, of which `again` gives unread copies; empty for
    nothing. Raises DataError for one that cannot be read."""

    def read(stream: _StreamRows, count: int) -> list[str]:
        return [str(row.content) for row in islice(stream, count)]

    whole = _StreamRows(again(), name, Shard(0), "")
    read(whole, 1)
    first = whole.cursor()
    expected = read(whole, 2)
    if len(expected) < 2:
        return ""
    resumed = _StreamRows(again(), name, Shard(0), first)
    if read(resumed, 1) != expected[:1]:
        return "after load_state_dict it does not go on with the next row"
    second = resumed.cursor()
    if json.loads(second)["state"] == json.loads(first)["state"]:
        return "after load_state_dict its state_dict stays the same while rows are read"
    if read(_StreamRows(again(), name, Shard(0), second), 1) != expected[1:]:
        return "the state_dict taken after a load_state_dict does not lead to the next row"
    return ""


def as_source(dataset: Any, name: str, column: str, max_document_bytes: int) -> Source:
    """What the factory of a registered dataset has made, as a source. Raises ConfigError."""
    if all(hasattr(dataset, method) for method in ("shards", "rows", "text", "locate")):
        return dataset  # type: ignore[no-any-return]
    from torch.utils.data import IterableDataset

    is_stream = isinstance(dataset, IterableDataset)
    if not is_stream and hasattr(dataset, "__getitem__"):
        if hasattr(dataset, "__len__"):
            return MapSource(dataset, name, column, max_document_bytes)
        problem = f"its dataset, a {type(dataset).__name__}, has no length"
        fix = "give its class __len__, or derive it from IterableDataset"
        raise ConfigError(ConfigIssue("training.dataset", problem, fix, value=name))
    if is_stream or (hasattr(dataset, "__iter__") and not isinstance(dataset, Iterator)):
        return StreamSource(dataset, name, column, max_document_bytes)
    problem = f"its factory has made a {type(dataset).__name__}, which cannot be read again"
    fix = "return a Dataset or IterableDataset of torch, or a Source"
    raise ConfigError(ConfigIssue("training.dataset", problem, fix, value=name))


def _has_parts(dataset: Any) -> bool:
    return hasattr(dataset, "shard") and hasattr(dataset, "num_shards")


def _has_state(dataset: Any) -> bool:
    return hasattr(dataset, "state_dict") and hasattr(dataset, "load_state_dict")


def _can_seek(dataset: Any) -> bool:
    return _has_state(dataset) and not _has_buffer(dataset)


def _has_buffer(dataset: Any) -> bool:
    """Whether it is a Hugging Face stream with a shuffle buffer, which its state leaves out."""
    parts = [getattr(dataset, "_ex_iterable", None)]
    for part in parts:
        if type(part).__name__ == "BufferShuffledExamplesIterable":
            return True
        if part is not None:
            parts += [getattr(part, "ex_iterable", None), *getattr(part, "ex_iterables", ())]
    return False


def _size(item: Any, depth: int) -> int:
    """Bytes of an item, about; a function of its content alone, as it decides on the order."""
    if isinstance(item, dict) and depth == 0:
        return sum(_size(value, 1) for value in item.values())
    return len(item) if hasattr(item, "__len__") else 8


def in_short(error: Exception) -> str:
    """The kind of an error, and the first line of what it says."""
    lines = str(error).strip().splitlines()
    return f"{type(error).__name__}: {lines[0]}" if lines else type(error).__name__
