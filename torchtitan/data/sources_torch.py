"""Datasets of torch, torchdata and Hugging Face as sources.

A map-style dataset is read by index in the lanes' order, and a resume goes straight to its place.
Anything iterable is read from its front. A resume loads its state if it has `state_dict` and
`load_state_dict` (or is a torchdata node); otherwise it reads again and skips the rows that were
used. A dataset must give equal rows on every pass, and must not split itself by rank or worker.
"""

import copy
import importlib.metadata
import json
from collections.abc import Callable, Iterator, Sequence
from itertools import islice
from typing import Any

import numpy as np

from torchtitan.config import ConfigError, ConfigIssue, DataError
from torchtitan.data.decode import transient_cause
from torchtitan.data.files import DataFile
from torchtitan.data.json_state import decode_state, encode_state
from torchtitan.data.pieces import PIECES_PER_LANE, Shard, whole_files
from torchtitan.data.sources import BadRow, Row, Source, read_document

_RANGE_ROWS = 1024
_MOST_RANGES = 2**16


class _DatasetSource:
    """The part that both kinds share; a resume also compares `description`."""

    kind: str
    files: Sequence[DataFile] = ()
    """Files on this machine, where they are known."""

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
    """A dataset with `len` and `[index]`; ranges of consecutive indices are its shards."""

    kind = "map"

    def __init__(self, dataset: Any, *args: Any, **description: Any):
        super().__init__(dataset, *args, rows=len(dataset), **description)

    def shards(self, num_lanes: int) -> list[Shard]:
        """Cut the data into shards for `num_lanes` lanes."""
        num_rows = len(self.dataset)
        size = min(num_rows // (PIECES_PER_LANE * num_lanes), _RANGE_ROWS)
        size = max(size, num_rows // _MOST_RANGES, 1)
        starts = range(0, num_rows, size)
        return [Shard(0, start, min(start + size, num_rows)) for start in starts]

    def num_documents(self) -> int:
        """Return the number of rows."""
        return len(self.dataset)

    def rows(self, shard: Shard) -> Iterator[Row]:
        """Yield the rows of a shard."""
        assert shard.end is not None
        for index in range(shard.start, shard.end):
            yield Row(index, 0, None)

    def text(self, row: Row) -> str | np.ndarray:
        """Return the text or the tokens of a row. Raises BadRow."""
        return read_document(self.record(row), self.column, self.max_document_bytes)

    def record(self, row: Row) -> Any:
        """Return the item of a row. Raises BadRow, and as it comes what may pass in a moment."""
        try:
            return self.dataset[row.place]
        except Exception as error:
            if transient_cause(error) is not None:
                raise
            raise BadRow(f"reading it failed: {in_short(error)}") from error

    def locate(self, shard: Shard, row: Row) -> str:
        """Return where a row is, for a message."""
        return f"{self.name}[{row.place}]"


class StreamSource(_DatasetSource):
    """A dataset that is iterated over.

    Its parts are the shards if it has `num_shards` and `shard(num_shards, index)`, as those of
    Hugging Face have; else, or where there are fewer parts than lanes, rows by stride.
    """

    kind = "stream"
    make: Callable[[], Any] | None = None
    """Makes the dataset anew, where that is cheap."""

    def __init__(self, dataset: Any, *args: Any, **description: Any):
        super().__init__(dataset, *args, **description)
        self._parted = dataset
        """The dataset, split further where that was needed and possible."""

    def __getstate__(self) -> dict[str, Any]:
        return {**self.__dict__, "make": None}  # worker processes do not need it

    def problems(self) -> list[ConfigIssue]:
        """Try a resume, and a resume of that, on the first three rows."""
        try:
            part = self._part(0)
            flaw = _resume_flaw(lambda: self._part(0), self.name) if _can_seek(part) else ""
            flaw = flaw or self._shuffle_flaw()
        except DataError as error:
            fix = "return a dataset that can be read and copied"
            return [ConfigIssue("training.dataset", str(error), fix, self.name)]
        if not flaw:
            return []
        fix = "correct its state_dict and load_state_dict, or remove both and read again"
        if flaw == _SHUFFLES:
            fix = "turn its shuffling off (lanes shuffle), or give it a seed"
        elif type(part).__module__.partition(".")[0] == "datasets":
            version = importlib.metadata.version("datasets")
            fix = f"install another version of the library `datasets` than {version}"
        return [ConfigIssue("training.dataset", f"a resume would go wrong: {flaw}", fix, self.name)]

    def _shuffle_flaw(self) -> str:
        """Compare first texts: of two passes, and of a dataset made anew, as a resume makes it."""
        if self.make is None or isinstance(self.dataset, _NodeDataset):
            return ""
        anew = StreamSource(self.make(), self.name, self.column, self.max_document_bytes)
        first, second, third = (
            [self._shown(row) for row in islice(source.rows(Shard(0)), 3)]
            for source in (self, self, anew)
        )
        return "" if first == second == third else _SHUFFLES

    def _shown(self, row: Row) -> str:
        try:
            return str(self.text(row))
        except BadRow:  # conversations, for one
            return str(row.content)

    def shards(self, num_lanes: int) -> list[Shard]:
        """Cut the data into shards for `num_lanes` lanes."""
        self._parted = self.dataset
        if self._num_parts() < num_lanes and hasattr(self.dataset, "reshard"):
            self._parted = self.dataset.reshard()
        self.description["parts"] = self._num_parts()
        return whole_files(range(self._num_parts()), num_lanes)

    def rows(self, shard: Shard, cursor: str = "") -> Iterator[Row]:
        """Yield the rows of a shard."""
        try:
            part = self._part(shard.file)
        except DataError:
            raise
        except Exception as error:
            raise DataError(f"{self.name}: cannot be opened: {in_short(error)}") from error
        return _StreamRows(part, self.name, shard, cursor)

    def text(self, row: Row) -> str | np.ndarray:
        """Return the text or the tokens of a row. Raises BadRow."""
        return read_document(row.content, self.column, self.max_document_bytes)

    def record(self, row: Row) -> Any:
        """Return the item of a row."""
        return row.content

    def locate(self, shard: Shard, row: Row) -> str:
        """Return where a row is, for a message."""
        part = f", part {shard.file + 1} of {self._num_parts()}" if self._num_parts() > 1 else ""
        return f"{self.name}{part} (row {row.place + 1})"

    def _num_parts(self) -> int:
        return int(self._parted.num_shards) if _has_parts(self._parted) else 1

    def _part(self, index: int) -> Any:
        if _has_parts(self._parted):
            return self._parted.shard(num_shards=self._num_parts(), index=index)
        return _copied(self._parted, self.name)


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
            self._protect(dataset.load_state_dict, decode_state(stored["state"]))
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
            return json.dumps({"rows": self._num_read, "state": encode_state(state)})
        except (TypeError, ValueError) as error:
            raise DataError(
                f"{self._name}: its state_dict() cannot be stored ({error}); it may hold text,"
                " bytes, numbers, booleans, None, lists, tuples, dicts, arrays and tensors"
            ) from error

    def _protect(self, function: Any, *arguments: Any) -> Any:
        try:
            return function(*arguments)
        except StopIteration:
            raise
        except Exception as error:
            message = f"{self._name}: reading failed after {self._num_read} rows"
            raise DataError(f"{message}: {in_short(error)}") from error


_SHUFFLES = "two passes over it begin with different rows"


def _resume_flaw(again: Callable[[], Any], name: str) -> str:
    """Describe why a dataset cannot be resumed; empty if it can. `again` returns unread copies.

    Raises DataError for one that cannot be read.
    """

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
        return "after load_state_dict its state_dict does not change as rows are read"
    if read(_StreamRows(again(), name, Shard(0), second), 1) != expected[1:]:
        return "the state_dict taken after a load_state_dict does not lead to the next row"
    return ""


class _NodeDataset:
    """A torchdata node. Nodes cannot be copied, so each reader has the factory make one."""

    def __init__(self, make: Callable[[], Any]):
        self._make = make
        self._node: Any = None
        self._start: Any = None

    def __iter__(self) -> Iterator[Any]:
        self._node = self._make()
        self._node.reset(self._start)
        self._start = None
        return iter(self._node)

    def state_dict(self) -> Any:
        """Return the node's state."""
        return self._node.state_dict()

    def load_state_dict(self, state: Any) -> None:
        """Begin the next pass at `state`."""
        self._start = state


def as_source(make: Callable[[], Any], name: str, column: str, max_document_bytes: int) -> Source:
    """Return the dataset that `make` makes as a source. Raises ConfigError.

    `make` calls the factory of the dataset. It is called again for each lane's torchdata node.
    """
    dataset = make()
    if all(hasattr(dataset, method) for method in ("shards", "rows", "text", "locate")):
        return dataset  # type: ignore[no-any-return]
    from torch.utils.data import DataLoader, IterableDataset

    def error(problem: str, fix: str) -> ConfigError:
        return ConfigError(ConfigIssue("training.dataset", problem, fix, value=name))

    is_stream = isinstance(dataset, IterableDataset)
    if not is_stream and hasattr(dataset, "__getitem__"):
        if hasattr(dataset, "__len__"):
            return MapSource(dataset, name, column, max_document_bytes)
        problem = f"its dataset, a {type(dataset).__name__}, has no length"
        raise error(problem, "give its class __len__, or derive it from IterableDataset")
    if isinstance(dataset, DataLoader):
        if dataset.batch_size is not None or dataset.batch_sampler is not None:
            raise error("its loader gives batches, and rows are needed", "set batch_size = None")
        if dataset.num_workers:
            problem = "its loader starts processes, and every lane has a copy of the loader"
            fix = "give it num_workers = 0, and set training.dataloader.num_workers"
            raise error(problem, fix)
    if _is_node(dataset):
        dataset = _NodeDataset(make)
    # An iterator without a state can be read once only, and every epoch reads again.
    can_begin_again = not isinstance(dataset, Iterator) or _has_state(dataset)
    if is_stream or (hasattr(dataset, "__iter__") and can_begin_again):
        stream = StreamSource(dataset, name, column, max_document_bytes)
        stream.make = make
        return stream
    problem = f"its factory returned a {type(dataset).__name__}, which cannot be read again"
    fix = "return a torch dataset, a torchdata node or loader, or a Source"
    raise error(problem, fix)


def _is_node(dataset: Any) -> bool:
    """Tell a torchdata node by its methods, without torchdata."""
    return isinstance(dataset, Iterator) and all(
        hasattr(dataset, method) for method in ("reset", "get_state", "state_dict")
    )


def _copied(dataset: Any, name: str) -> Any:
    """Return a copy of a dataset whose state is in the object. Raises DataError."""
    if not _has_state(dataset):
        return dataset
    try:
        return copy.deepcopy(dataset)
    except Exception as error:
        raise DataError(
            f"{name}: every lane reads a copy of the dataset, and it cannot be copied"
            f" ({in_short(error)}); open files and connections in its __iter__"
        ) from error


def _has_parts(dataset: Any) -> bool:
    return hasattr(dataset, "shard") and hasattr(dataset, "num_shards")


def _has_state(dataset: Any) -> bool:
    return hasattr(dataset, "state_dict") and hasattr(dataset, "load_state_dict")


def _can_seek(dataset: Any) -> bool:
    return _has_state(dataset) and not _has_buffer(dataset)


def _has_buffer(dataset: Any) -> bool:
    """Tell whether it is a Hugging Face stream with a shuffle buffer, which its state omits."""
    parts = [getattr(dataset, "_ex_iterable", None)]
    for part in parts:
        if type(part).__name__ == "BufferShuffledExamplesIterable":
            return True
        if part is not None:
            parts += [getattr(part, "ex_iterable", None), *getattr(part, "ex_iterables", ())]
    return False


def _size(item: Any, depth: int) -> int:
    """Return about the bytes of an item; by its content alone, as it decides on the order."""
    if isinstance(item, dict) and depth == 0:
        return sum(_size(value, 1) for value in item.values())
    return len(item) if hasattr(item, "__len__") else 8


def in_short(error: Exception) -> str:
    """Return the kind of an error and the first line of its message."""
    lines = str(error).strip().splitlines()
    return f"{type(error).__name__}: {lines[0]}" if lines else type(error).__name__
