"""Every kind of source gives the same samples on every mesh, and after every stop."""

import json
from collections import Counter
from collections.abc import Callable, Iterator
from pathlib import Path
from typing import Any

import datasets
import numpy as np
import pyarrow
import pyarrow.parquet
import pytest
import torch
from data_runs import NUM_LANES, Run, make_config, make_documents
from test_data_order import PAD, all_steps, lane_documents
from torch.utils.data import Dataset, IterableDataset, get_worker_info

from torchtitan.data import lanes, registry, sources_parquet
from torchtitan.data.registry import register_dataset
from torchtitan.data.tokenizers import build_tokenizer

Maker = Callable[[Path, list[str]], dict[str, Any]]
"""Writes documents, and says what to set: the arguments of `make_config`."""


class Texts(Dataset[str]):
    """Map style, rows are texts."""

    def __init__(self, documents: list[str]):
        self.documents = documents
        self.num_read = 0

    def __len__(self) -> int:
        return len(self.documents)

    def __getitem__(self, index: int) -> str:
        self.num_read += 1
        return self.documents[index]


class Rows(IterableDataset[dict[str, Any]]):
    """Rows are dicts. Cuts itself up by worker, which must not have any effect."""

    num_made = 0

    def __init__(self, documents: list[str]):
        self.documents = documents

    def __iter__(self) -> Iterator[dict[str, Any]]:
        info = get_worker_info()
        step = 1 if info is None else info.num_workers
        for number, text in enumerate(self.documents[::step]):
            type(self).num_made += 1
            yield {"id": number, "text": text}


class Stateful(IterableDataset[torch.Tensor]):
    """Rows are tensors of tokens; goes on where its state says."""

    num_made = 0

    def __init__(self, documents: list[str]):
        tokenizer = build_tokenizer("bytes")
        self.rows = [tokenizer.encode(text, bos=True, eos=True) for text in documents]
        self.next = 0

    def __iter__(self) -> Iterator[torch.Tensor]:
        while self.next < len(self.rows):
            self.next += 1
            type(self).num_made += 1
            yield torch.tensor(self.rows[self.next - 1])

    def state_dict(self) -> dict[str, Any]:
        return {"next": self.next}

    def load_state_dict(self, state: dict[str, Any]) -> None:
        self.next = state["next"]


def parquet_groups(folder: Path, documents: list[str]) -> dict[str, Any]:
    """Two files of several row groups, one of them empty."""
    for name, part in (("a", documents[:90]), ("b", documents[90:])):
        table = pyarrow.table({"id": range(len(part)), "text": part})
        with pyarrow.parquet.ParquetWriter(folder / f"{name}.parquet", table.schema) as writer:
            writer.write_table(table.slice(0, 0))
            writer.write_table(table, row_group_size=19)
    return {"path": str(folder)}


def parquet_one_group(folder: Path, documents: list[str]) -> dict[str, Any]:
    """One row group, which the lanes share; an encoding of repeated values."""
    texts = pyarrow.array(documents).dictionary_encode()
    pyarrow.parquet.write_table(pyarrow.table({"text": texts}), folder / "a.parquet")
    return {"path": str(folder / "*.parquet"), "dataset": "parquet"}


def parquet_files(folder: Path, documents: list[str]) -> dict[str, Any]:
    """So many files that each is a shard."""
    for n in range(16 * NUM_LANES):
        table = pyarrow.table({"text": documents[n :: 16 * NUM_LANES]})
        pyarrow.parquet.write_table(table, folder / f"{n:03}.parquet", row_group_size=2)
    return {"path": str(folder)}


def parquet_tokens(folder: Path, documents: list[str]) -> dict[str, Any]:
    rows = Stateful(documents).rows
    table = pyarrow.table({"ids": pyarrow.array(rows, pyarrow.list_(pyarrow.int32()))})
    pyarrow.parquet.write_table(table, folder / "a.parquet", row_group_size=20)
    return {"path": str(folder), "text_column": "ids"}


def hf_saved(folder: Path, documents: list[str]) -> dict[str, Any]:
    rows = datasets.Dataset.from_dict({"id": range(len(documents)), "text": documents})
    datasets.DatasetDict({"train": rows, "test": rows.select([0])}).save_to_disk(folder / "saved")
    return {"path": str(folder / "saved"), "dataset": "hf"}


def hf_streamed_json(folder: Path, documents: list[str]) -> dict[str, Any]:
    """Fewer files than lanes."""
    for name, part in (("train-a", documents[:90]), ("train-b", documents[90:])):
        lines = [json.dumps({"text": text, "id": n}) for n, text in enumerate(part)]
        (folder / f"{name}.jsonl").write_text("\n".join(lines) + "\n")
    return {"path": str(folder), "dataset": "hf"}


def hf_streamed_parquet(folder: Path, documents: list[str]) -> dict[str, Any]:
    """More files than lanes."""
    for n in range(5):
        table = pyarrow.table({"text": documents[n::5], "id": range(len(documents[n::5]))})
        pyarrow.parquet.write_table(table, folder / f"{n}.parquet", row_group_size=9)
    return {"path": str(folder), "dataset": "hf"}


def registered(kind: type) -> Maker:
    def make(folder: Path, documents: list[str]) -> dict[str, Any]:
        register_dataset("own", lambda training, data: kind(documents))
        return {"path": None, "dataset": "own"}

    return make


MAKERS: dict[str, Maker] = {
    "parquet groups": parquet_groups,
    "parquet one group": parquet_one_group,
    "parquet files": parquet_files,
    "parquet tokens": parquet_tokens,
    "hf saved": hf_saved,
    "hf streamed json": hf_streamed_json,
    "hf streamed parquet": hf_streamed_parquet,
    "map": registered(Texts),
    "stream": registered(Rows),
    "stream with state": registered(Stateful),
}


@pytest.fixture(autouse=True)
def registered_only_here(monkeypatch):
    monkeypatch.setattr(registry.DATASETS, "_registered", dict(registry.DATASETS._registered))


@pytest.fixture(params=sorted(MAKERS))
def wanted(request: pytest.FixtureRequest, tmp_path: Path) -> tuple[dict[str, Any], list[str]]:
    """What to set, and the documents."""
    documents = make_documents(200)
    return MAKERS[request.param](tmp_path, documents), documents


def test_every_document_once_an_epoch_on_every_mesh(wanted):
    options, documents = wanted
    expected = all_steps(make_config(**options, epochs=2))
    seen = [text for lane in range(NUM_LANES) for text in lane_documents(expected, lane)]
    assert Counter(seen) == Counter(documents * 2)
    for dp, num_workers in ((2, 0), (4, 0), (2, 1), (1, 2)):
        steps = all_steps(make_config(**options, num_workers=num_workers, epochs=2), dp)
        assert np.array_equal(steps, expected), (dp, num_workers)


def test_resume_at_every_step(wanted, monkeypatch):
    """In small blocks, so that nearly every resume begins in the middle of a shard."""
    monkeypatch.setattr(lanes, "_BLOCK_ROWS", 5)
    config = make_config(**wanted[0], epochs=2)
    run = Run(config)
    steps, states = [], []
    for step in run.steps():
        steps.append(step)
        states.append(run.lane_states)
    assert len(steps) > 20
    chained = states[0]
    for k in range(0, len(steps) - 4, 3):
        resumed = Run(config, (1, 2, 4)[k // 3 % 3], lane_states=states[k])
        assert np.array_equal(resumed.step(), steps[k + 1]), k
        assert places(resumed.lane_states) == places(states[k + 1]), k
        # What a resumed run has stored must be as good to go on from.
        again = Run(config, (4, 1, 2)[k // 3 % 3], lane_states=chained)
        assert np.array_equal([again.step() for _ in range(3)], steps[k + 1 : k + 4]), k
        chained = again.lane_states
    rest = list(Run(config, 2, lane_states=chained).steps())
    assert np.array_equal(rest, steps[-len(rest) :]) and 0 < len(rest) < 6


def places(states: dict[str, Any]) -> dict[str, Any]:
    """Without the cursors: the same place may be told in several ways."""
    return {lane: {**state, "cursor": ""} for lane, state in states.items()}


@pytest.mark.parametrize("maker", [parquet_one_group, hf_streamed_json, registered(Stateful)])
def test_resume_in_a_later_block_with_workers(maker, tmp_path):
    """Blocks as large as they are; lanes of many rows; another number of workers each time."""
    documents = [f"<{n}> mesh" for n in range(2 * 1024 * 2 + 500)]
    options = maker(tmp_path, documents)
    lane_options = {"num_lanes": 2, "global_batch": 64}
    expected = all_steps(make_config(**options, epochs=1), **lane_options)
    states: dict[str, Any] | None = None
    steps: list[np.ndarray] = []
    cursors = []
    for dp, num_workers in ((1, 2), (2, 1), (2, 0)):
        config = make_config(**options, num_workers=num_workers, epochs=1)
        run = Run(config, dp, lane_states=states, **lane_options)
        count = len(expected) // 3 + 1 if num_workers else len(expected) - len(steps)
        steps += [run.step() for _ in range(count)]
        states = run.lane_states
        cursors += [state["cursor"] for state in states.values()]
        run.close()
    assert any(cursors)
    assert np.array_equal(np.stack(steps), expected)


# Seeking ---------------------------------------------------------------------------------------


def state_before_the_end(options: dict[str, Any]) -> tuple[Any, dict[str, Any]]:
    """A config of one lane, and the state in the last tenth of its epoch."""
    config = make_config(**options, epochs=1, shuffle=False)
    run = Run(config, num_lanes=1, global_batch=1)
    states = []
    for step in run.steps():
        if not np.any(step == PAD):
            states.append(run.lane_states)
    return config, states[-len(states) // 20]


def test_parquet_seeks_to_the_row_group(tmp_path, monkeypatch):
    monkeypatch.setattr(lanes, "_BLOCK_ROWS", 5)
    for n in range(16):
        table = pyarrow.table({"text": make_documents(30, seed=n)})
        pyarrow.parquet.write_table(table, tmp_path / f"{n:02}.parquet", row_group_size=10)
    config, state = state_before_the_end({"path": str(tmp_path)})
    read = []
    contents = sources_parquet._contents
    monkeypatch.setattr(
        sources_parquet,
        "_contents",
        lambda file, parquet, group, *rest: (
            read.append((file.path[-10:], group)) or contents(file, parquet, group, *rest)
        ),
    )
    list(Run(config, num_lanes=1, global_batch=1, lane_states=state).steps())
    # 16 files of one lane are its shards: the last file, and of it not the row groups before.
    assert read in ([("15.parquet", 1), ("15.parquet", 2)], [("15.parquet", 2)])


def test_map_style_reads_nothing_again(tmp_path, monkeypatch):
    dataset = Texts(make_documents(400))
    register_dataset("own", lambda training, data: dataset)
    config, state = state_before_the_end({"path": None, "dataset": "own"})
    dataset.num_read = 0
    list(Run(config, num_lanes=1, global_batch=1, lane_states=state).steps())
    assert 0 < dataset.num_read < 60


@pytest.mark.parametrize("kind", [Rows, Stateful])
def test_stream_uses_its_state_if_it_has_one(kind, monkeypatch):
    monkeypatch.setattr(lanes, "_BLOCK_ROWS", 5)
    register_dataset("own", lambda training, data: kind(make_documents(400)))
    config, state = state_before_the_end({"path": None, "dataset": "own"})
    kind.num_made = 0
    list(Run(config, num_lanes=1, global_batch=1, lane_states=state).steps())
    if kind is Rows:
        assert kind.num_made == 400
    else:
        assert 0 < kind.num_made < 60


def test_shuffle_buffer_is_read_again(tmp_path, monkeypatch):
    """The state of such a stream leaves the buffer out, so it cannot be gone on from."""
    monkeypatch.setattr(lanes, "_BLOCK_ROWS", 5)
    hf_streamed_json(tmp_path, make_documents(200))
    stream = datasets.load_dataset(str(tmp_path), split="train", streaming=True)
    register_dataset("own", lambda training, data: stream.shuffle(seed=3, buffer_size=20))
    config = make_config(None, dataset="own", epochs=1)
    run = Run(config)
    steps, states = [], []
    for step in run.steps():
        steps.append(step)
        states.append(run.lane_states)
    middle = len(steps) // 2
    resumed = Run(config, 2, lane_states=states[middle])
    assert np.array_equal(np.stack(list(resumed.steps())), np.stack(steps[middle + 1 :]))
