"""Reads that fail for a moment, for good, or stand still: on any kind of source."""

import errno
import gzip
import http.client
import io
import json
import os
import random
import re
import tarfile
import threading
import time
from collections.abc import Callable, Iterator
from pathlib import Path
from types import SimpleNamespace
from typing import Any, ClassVar

import numpy as np
import pyarrow
import pyarrow.parquet
import pytest
from data_runs import WRITERS, Run, make_config, make_documents
from torch.utils.data import Dataset, IterableDataset

from torchtitan.config import DataError
from torchtitan.data import files, reading, registry, workers
from torchtitan.data.decode import transient_cause
from torchtitan.data.pieces import Shard
from torchtitan.data.sources import Row

DOCUMENTS = make_documents(200)
real_parquet = pyarrow.parquet.ParquetFile
TRANSIENT = [
    OSError(errno.EIO, "Input/output error"),
    OSError(errno.ESTALE, "Stale file handle"),
    ConnectionResetError("closed by the server"),  # without a number, as libraries raise it
]


class Faults:
    """A fault of every so many operations, at random places."""

    def __init__(self, share: float, errors: list[Exception]):
        self.share = share
        self.count = 0
        self._errors = errors
        self._random = random.Random(3)

    def __call__(self, *_: Any) -> None:
        if self._random.random() < self.share:
            self.count += 1
            raise self._errors[self.count % len(self._errors)]


class FlakyFile(io.FileIO):
    """A file on a disk that fails now and then; nothing is read ahead."""

    def __init__(self, path: str, faults: Callable[..., None]):
        faults(path)
        super().__init__(path)
        self._faults = faults

    def readinto(self, buffer: Any) -> int | None:
        """Fill a buffer, or fail."""
        self._faults(self.name)
        return super().readinto(memoryview(buffer)[:777])


def make_flaky(monkeypatch: pytest.MonkeyPatch, faults: Callable[..., None]) -> None:
    def open_flaky(path: str, mode: str = "rb") -> Any:
        return io.BufferedReader(FlakyFile(path, faults), 512)

    def parquet(path: Any, **options: Any) -> Any:
        return real_parquet(pyarrow.PythonFile(FlakyFile(path, faults), "r"), **options)

    monkeypatch.setattr(files, "open", open_flaky, raising=False)
    monkeypatch.setattr(pyarrow.parquet, "ParquetFile", parquet)
    monkeypatch.setattr(reading, "FIRST_PAUSE_SECONDS", 0.0)


def write_parquet(folder: Path, documents: list[str]) -> str:
    table = pyarrow.table({"text": documents})
    pyarrow.parquet.write_table(table, folder / "a.parquet", row_group_size=20)
    return str(folder / "a.parquet")


class Rows(Dataset[dict[str, str]]):
    """Rows by number."""

    faults: Callable[..., None] = staticmethod(lambda *_: None)

    def __len__(self) -> int:
        return len(DOCUMENTS)

    def __getitem__(self, index: int) -> dict[str, str]:
        self.faults()
        return {"text": DOCUMENTS[index]}


class Stream(IterableDataset[dict[str, str]]):
    """Rows in order; a resume reads them again."""

    faults: Callable[..., None] = staticmethod(lambda *_: None)

    def __iter__(self) -> Iterator[dict[str, str]]:
        for text in DOCUMENTS:
            self.faults()
            yield {"text": text}


class SeekingStream(Stream):
    """Rows in order; a resume loads its state."""

    start = 0

    def __iter__(self) -> Iterator[dict[str, str]]:
        while self.start < len(DOCUMENTS):
            self.faults()
            self.start += 1
            yield {"text": DOCUMENTS[self.start - 1]}
        self.start = 0

    def state_dict(self) -> dict[str, Any]:
        return {"start": self.start}

    def load_state_dict(self, state: dict[str, Any]) -> None:
        self.start = state["start"]


class Slow:
    """A source of which a service makes the text, which does not answer in time."""

    description: ClassVar[dict[str, Any]] = {}

    def shards(self, num_lanes: int) -> list[Shard]:
        return [Shard(number) for number in range(num_lanes)]

    def rows(self, shard: Shard) -> Iterator[Row]:
        yield Row(0, 1, "content")

    def text(self, row: Row) -> str:
        raise TimeoutError("the service did not answer")

    def locate(self, shard: Shard, row: Row) -> str:
        return str(row.place)


registry.register_dataset("slow-service", lambda training, data: Slow())
KINDS = {"rows": Rows, "stream": Stream, "seeking": SeekingStream}
for _name, _kind in KINDS.items():
    registry.register_dataset(f"flaky-{_name}", lambda training, data, kind=_kind: kind())


def config_of(kind: str, folder: Path, **data: Any) -> Any:
    if kind in KINDS:
        return make_config(None, dataset=f"flaky-{kind}", **data)
    write = write_parquet if kind == "parquet" else WRITERS[kind]
    return make_config(write(folder, DOCUMENTS), **data)


def read(config: Any, **options: Any) -> tuple[list[np.ndarray], list[dict[str, Any]]]:
    run, states, steps = Run(config, **options), [], []
    for step in run.steps():
        steps.append(step)
        states.append(run.lane_states)
    run.close()
    return steps, states


SHARES = {"text": 0.2, "parquet": 0.2, "stream": 0.005, "seeking": 0.005, "array": 0.02}
"""The share of operations that fail; a small one where a new try goes through many."""


@pytest.mark.fault("F38")
@pytest.mark.parametrize("kind", [*WRITERS, "parquet", *KINDS])
def test_samples_are_the_same_where_reads_fail_now_and_then(kind, tmp_path, monkeypatch, caplog):
    """None is left out, none comes twice, also after a resume in the middle."""
    config = config_of(kind, tmp_path, epochs=2, read_retries=50)
    expected, states = read(config)
    faults = Faults(SHARES.get(kind, 0.05), TRANSIENT)
    run = Run(config)  # what a start reads is not read again: the command is
    resumed = Run(config, lane_states=states[len(states) // 2])
    make_flaky(monkeypatch, faults)
    for known in KINDS.values():
        monkeypatch.setattr(known, "faults", staticmethod(faults))
    for number, step in enumerate(run.steps()):
        assert np.array_equal(step, expected[number]) and run.lane_states == states[number]
    assert number == len(expected) - 1
    rest = list(resumed.steps())
    assert np.array_equal(rest, expected[len(states) // 2 + 1 :])
    assert faults.count > 3
    warnings = [record.getMessage() for record in caplog.records]
    assert len([text for text in warnings if text.startswith("Reading failed at ")]) > 3
    run.close()
    resumed.close()


BROKEN = Faults(1.0, TRANSIENT[:1])
PLACES = {
    "jsonl": r"data\.jsonl \(byte \d+\)",
    "gz": r"[ab]\.jsonl\.gz \(byte \d+\)",
    "parquet": r"a\.parquet \(.*row.* \d+\)",
    "rows": r"flaky-rows\[\d+\]",
    "seeking": r"flaky-seeking \(row \d+\)",
}


@pytest.mark.fault("F38")
@pytest.mark.parametrize("kind", PLACES)
def test_a_failure_for_good_ends_the_run_with_file_and_row(kind, tmp_path, monkeypatch, caplog):
    config = config_of(kind, tmp_path, read_retries=2, on_bad_row="skip")
    run = Run(config)
    run.step()
    make_flaky(monkeypatch, BROKEN)
    for known in KINDS.values():
        monkeypatch.setattr(known, "faults", staticmethod(BROKEN))
    with pytest.raises(DataError) as caught:
        for _ in range(200):
            run.step()
    run.close()
    assert f"Reading failed at {tmp_path if kind in WRITERS else ''}" in caplog.text
    place = PLACES[kind]
    text = r"^reading failed 3 times at .*" + place + r": OSError: \[Errno 5\] Input/output error$"
    assert re.search(text, str(caught.value)), str(caught.value)
    tries = [r.getMessage() for r in caplog.records if r.getMessage().startswith("Reading failed")]
    assert ["(1 of 2)" in tries[0], "(2 of 2)" in tries[1], len(tries)] == [True, True, 2]


@pytest.mark.parametrize("number", [errno.EACCES, errno.ENOENT, errno.EISDIR])
def test_what_does_not_pass_is_not_tried_again(number, tmp_path, monkeypatch, caplog):
    config = config_of("jsonl", tmp_path, read_retries=3)
    run = Run(config)
    make_flaky(monkeypatch, Faults(1.0, [OSError(number, os.strerror(number))]))
    with pytest.raises(DataError, match=r"data\.jsonl: cannot be read"):
        run.step()
    run.close()
    assert "trying again" not in caplog.text


def test_pauses_grow(monkeypatch):
    pauses: list[float] = []
    monkeypatch.setattr(time, "sleep", pauses.append)
    with pytest.raises(DataError, match="failed 9 times at here"):
        reading.persist(BROKEN, lambda: "here", 8)
    assert pauses == [1, 2, 4, 8, 16, 32, 64, 64], "up to a minute: many tries last for hours"


@pytest.mark.parametrize("num_workers", [0, 2])
def test_an_error_of_a_dataset_is_not_taken_for_a_row_that_is_late(num_workers):
    run = Run(make_config(None, num_workers, dataset="slow-service"))
    with pytest.raises(TimeoutError, match="the service did not answer"):
        run.step()
    run.close()


def test_rows_may_be_a_list():
    rows = [Row(0, 1, "a"), Row(1, 1, "b")]
    source: Any = SimpleNamespace(rows=lambda shard: rows)
    assert list(reading.ShardRows(source, Shard(0))) == rows


def test_a_source_that_locates_rows_by_their_content_can_be_waited_for():
    """The row has not been read yet, and a message must not end a run that only waits."""
    by_content: Any = SimpleNamespace(locate=lambda shard, row: row.content["id"])
    assert reading.describe_place(by_content, Shard(1), 6) == "part 2 (row 7)"


def test_a_damaged_archive_is_no_answer_that_broke_off():
    """`tarfile` calls its error `ReadError`, as HTTP libraries do."""
    assert transient_cause(http.client.IncompleteRead(b"")) is not None
    assert transient_cause(tarfile.ReadError("file could not be opened")) is None


@pytest.mark.fault("F39")
def test_a_short_stall_is_a_warning(tmp_path, monkeypatch, caplog):
    config = config_of("jsonl", tmp_path, epochs=1)
    expected, _ = read(config)
    monkeypatch.setattr(workers, "_POLL_SECONDS", 0.05)
    monkeypatch.setattr(workers, "_WARN_SECONDS", 0.2)
    run, released, stalls = Run(config), threading.Event(), []

    def stall(*_: Any) -> None:
        if not stalls:
            stalls.append(run.loaders[0].reading())
            released.wait(60)

    def release() -> None:
        while "Waiting for data" not in caplog.text:
            time.sleep(0.02)
        stalls.append(run.loaders[0].reading())
        released.set()

    make_flaky(monkeypatch, stall)
    threading.Thread(target=release, daemon=True).start()
    assert np.array_equal(list(run.steps()), expected)
    assert stalls[1].startswith(f"{tmp_path}/data.jsonl (byte ")
    assert f"s, from {stalls[1]}" in caplog.text
    run.close()


@pytest.mark.fault("F39")
@pytest.mark.parametrize("num_workers", [0, 2])
def test_a_stall_for_good_ends_the_step_with_file_and_row(num_workers, tmp_path, monkeypatch):
    """A pipe without a writer stands for a disk that does not answer."""
    run = Run(config_of("jsonl", tmp_path, num_workers=num_workers))
    run.step()
    file = tmp_path / "data.jsonl"
    file.unlink()
    os.mkfifo(file)
    started = time.monotonic()
    with pytest.raises(DataError, match=r"^waits for data for \d+ s, .*data\.jsonl \(byte \d+\)$"):
        for _ in range(500):
            run.loaders[0].next_step(1.0)
    assert time.monotonic() - started >= 1
    assert run.loaders[0].reading().startswith(str(file))
    run.close()  # does not wait for it


def write_bad_lines(folder: Path) -> None:
    lines = [json.dumps({"text": text}) for text in DOCUMENTS]
    (folder / "a.jsonl").write_text(
        "\n".join([*lines[:90], "{", *lines[90:150], "[}", *lines[150:]])
    )


def write_bad_page(folder: Path) -> None:
    table = pyarrow.table({"text": DOCUMENTS})
    file = folder / "a.parquet"
    pyarrow.parquet.write_table(table, file, row_group_size=20, use_dictionary=False)
    column = pyarrow.parquet.ParquetFile(file).metadata.row_group(4).column(0)
    content, start = bytearray(file.read_bytes()), column.data_page_offset
    end = start + column.total_compressed_size
    content[start + 30 : end] = bytes(end - start - 30)
    file.write_bytes(content)


def write_bad_tail(folder: Path) -> None:
    letters = random.Random(0)  # so that much is left of a half
    lines = [json.dumps({"text": letters.randbytes(40).hex()}) + "\n" for _ in range(200)]
    packed = gzip.compress("".join(lines).encode())
    for number in range(4):
        (folder / f"{number}.jsonl.gz").write_bytes(packed[: len(packed) // (1 + number % 2)])


@pytest.mark.fault("F40")
@pytest.mark.parametrize(
    ("write", "count"), [(write_bad_lines, 2), (write_bad_page, 1), (write_bad_tail, 2)]
)
def test_places_after_bad_rows_are_exact(write, count, tmp_path, caplog):
    """On any mesh, with any number of workers, and after a resume at any place."""
    write(tmp_path)
    config = make_config(str(tmp_path), epochs=2, on_bad_row="skip")
    expected, states = read(config)
    left_out = [sum(lane["bad_rows"] for lane in state.values()) for state in states]
    assert left_out[0] == 0 and left_out[-1] == count, "each in one epoch only"
    told = [r.getMessage() for r in caplog.records if r.getMessage().startswith("Left out a row")]
    assert len(told) == count and all(f"{tmp_path}/" in text for text in told)
    with_workers = make_config(str(tmp_path), 2, epochs=2, on_bad_row="skip")
    steps, found = read(with_workers, dp=2)
    assert np.array_equal(steps, expected) and found == states
    for place in range(0, len(states) - 1, max(1, len(states) // 9)):
        steps, found = read(config, dp=4, lane_states=states[place])
        assert np.array_equal(steps, expected[place + 1 :]) and found == states[place + 1 :]
