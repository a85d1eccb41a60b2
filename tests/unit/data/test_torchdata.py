"""torchdata nodes, stateful loaders and objects with a state as registered datasets."""

import random
from collections import Counter
from collections.abc import Iterator
from pathlib import Path
from typing import Any

import numpy as np
import pytest
import torch
from data_runs import NUM_LANES, Run, make_config, make_documents
from test_bad_data import facts_for, only
from test_data_order import all_steps, lane_documents
from torch.utils.data import DataLoader, Dataset, IterableDataset

from torchtitan.config import DataError
from torchtitan.data import lanes, registry
from torchtitan.data.json_state import decode_state, encode_state
from torchtitan.data.registry import register_dataset
from torchtitan.preflight.data import check_environment

nodes = pytest.importorskip("torchdata.nodes")
stateful = pytest.importorskip("torchdata.stateful_dataloader")

DOCUMENTS = make_documents(120)


class Texts(Dataset[dict[str, str]]):
    def __len__(self) -> int:
        return len(DOCUMENTS)

    def __getitem__(self, index: int) -> dict[str, str]:
        return {"text": DOCUMENTS[index]}


class Walker:
    """An iterator with a state that JSON does not have: a generator's, a tuple, numbers as keys."""

    def __init__(self) -> None:
        self.random = random.Random(3)
        self.left = dict(enumerate(DOCUMENTS))

    def __iter__(self) -> Iterator[str]:
        return self

    def __next__(self) -> str:
        if not self.left:
            raise StopIteration
        return self.left.pop(self.random.choice(list(self.left)))

    def state_dict(self) -> dict[str, Any]:
        return {"random": self.random.getstate(), "left": dict(self.left)}

    def load_state_dict(self, state: dict[str, Any]) -> None:
        self.random.setstate(state["random"])
        self.left = dict(state["left"])


def as_row(text: str) -> dict[str, str]:
    return {"text": text}


def pipeline(training: Any = None, data: Any = None) -> Any:
    """A chain with threads that read ahead. Worker processes call this factory by its name."""
    mapped = nodes.ParallelMapper(nodes.IterableWrapper(DOCUMENTS), as_row, num_workers=1)
    return nodes.Prefetcher(mapped, prefetch_factor=3)


def shuffled_loader(**options: Any) -> Any:
    options = {"generator": torch.Generator().manual_seed(5), **options}
    return stateful.StatefulDataLoader(Texts(), batch_size=None, shuffle=True, **options)


KINDS = {
    "node": lambda: nodes.Mapper(nodes.IterableWrapper(DOCUMENTS), as_row),
    "pipeline": pipeline,
    "loader of nodes": lambda: nodes.Loader(nodes.IterableWrapper(DOCUMENTS)),
    "stateful loader": lambda: stateful.StatefulDataLoader(Texts(), batch_size=None),
    "shuffled loader": shuffled_loader,
    "iterator": Walker,
}


@pytest.fixture
def small_blocks(monkeypatch):
    """Several cursors in so few documents."""
    monkeypatch.setattr(lanes, "_BLOCK_ROWS", 8)


def configure(made: Any, **options: Any) -> Any:
    registry.DATASETS._registered.pop("mine", None)
    register_dataset("mine", made if made is pipeline else lambda training, data: made())
    return make_config(None, dataset="mine", **options)


@pytest.mark.parametrize("kind", sorted(KINDS))
def test_every_row_once_and_resumed_on_any_mesh(kind, small_blocks):
    config = configure(KINDS[kind], epochs=2)
    steps = all_steps(config)
    seen = [text for lane in range(NUM_LANES) for text in lane_documents(steps, lane)]
    assert Counter(seen) == Counter(DOCUMENTS * 2)
    run, states = Run(config), []
    for _ in range(len(steps)):
        run.step()
        states.append(run.lane_states)
    run.close()
    for k in range(2, len(steps) - 1, 7):
        resumed = Run(config, (1, 2, 4)[k % 3], lane_states=states[k])
        for step in steps[k + 1 : k + 8]:  # into the next block, where a second state is taken
            assert np.array_equal(resumed.step(), step), k
        states_again = resumed.lane_states
        resumed.close()
        again = Run(config, 2, lane_states=states_again)
        for step in steps[k + 8 : k + 10]:
            assert np.array_equal(again.step(), step), k
        again.close()


@pytest.mark.parametrize("kind", ["pipeline", "stateful loader", "iterator"])
def test_worker_processes_read_the_same(kind):
    expected = all_steps(configure(KINDS[kind], epochs=1))
    assert np.array_equal(all_steps(configure(KINDS[kind], num_workers=2, epochs=1), 2), expected)


def test_a_resume_reads_nothing_twice(small_blocks):
    """But the block in which it was stopped."""
    read: list[str] = []

    def noted(text: str) -> str:
        read.append(text)
        return text

    config = configure(lambda: nodes.Mapper(nodes.IterableWrapper(WithState()), noted))
    run = Run(config, num_lanes=1, global_batch=1)
    for _ in range(90):
        run.step()
    num_read = len(read)
    states, read[:] = run.lane_states, []
    expected = run.step()
    read.clear()
    resumed = Run(config, num_lanes=1, global_batch=1, lane_states=states)
    assert np.array_equal(resumed.step(), expected)
    assert len(read) <= 8 * 2 < num_read


class WithState:
    def __init__(self) -> None:
        self.next = 0

    def __iter__(self) -> Iterator[str]:
        while self.next < len(DOCUMENTS):
            self.next += 1
            yield DOCUMENTS[self.next - 1]
        self.next = 0

    def state_dict(self) -> dict[str, Any]:
        return {"next": self.next}

    def load_state_dict(self, state: dict[str, Any]) -> None:
        self.next = state["next"]


def stateless_loader() -> Any:
    """It has a seed, and each pass another order."""
    options: dict[str, Any] = {"generator": torch.Generator().manual_seed(5), "shuffle": True}
    return DataLoader(Texts(), batch_size=None, **options)


def uncopyable() -> Any:
    walker = Walker()
    walker.file = open(__file__)  # type: ignore[attr-defined]  # noqa: SIM115
    return walker


@pytest.mark.parametrize(
    ("made", "text"),
    [
        (lambda: stateful.StatefulDataLoader(Texts(), batch_size=4), "gives batches"),
        (lambda: shuffled_loader(num_workers=2), "num_workers = 0"),
        (lambda: shuffled_loader(generator=None), "begin with different rows"),
        (stateless_loader, "begin with different rows"),
        (lambda: (text for text in DOCUMENTS), "cannot be read again"),
        (uncopyable, "cannot be copied (TypeError"),
    ],
)
def test_what_cannot_be_resumed_is_refused(made, text):
    configure(made)
    assert text in str(only(check_environment(facts_for(None, training__dataset="mine", lanes=1))))


class Strided(IterableDataset[Any]):
    """Its first part begins with other rows than the whole; rows hold an object, too."""

    def __init__(self, rows: list[str] = DOCUMENTS, num_shards: int = 4):
        self.rows, self.num_shards = rows, num_shards

    def shard(self, num_shards: int, index: int) -> "Strided":
        return Strided(self.rows[index::num_shards], 1)

    def __iter__(self) -> Iterator[Any]:
        return ({"text": text, "note": object()} for text in self.rows)


def shuffled_parts() -> Any:
    datasets = pytest.importorskip("datasets")
    rows = datasets.Dataset.from_list([as_row(text) for text in DOCUMENTS])
    return rows.to_iterable_dataset(num_shards=4).shuffle(seed=3, buffer_size=4)


@pytest.mark.parametrize("made", [Strided, shuffled_parts])
def test_parts_in_another_order_than_the_whole_are_no_shuffling(made):
    configure(made)
    assert check_environment(facts_for(None, training__dataset="mine", lanes=1)) == []


def test_a_state_that_cannot_be_stored(small_blocks):
    class Odd(Walker):
        def state_dict(self) -> dict[str, Any]:
            return {"random": self.random}

    run = Run(configure(Odd), num_lanes=1)
    with pytest.raises(DataError, match=r"state_dict\(\) cannot be stored \(it holds a Random\)"):
        for _ in range(9):
            run.step()


def test_stored_states_come_back_as_they_were(tmp_path: Path):
    state = {
        "plain": [1, 2.5, "three", None, True, {"a": []}],
        "tuple": (1, (2, 3)),
        "keys": {1: "one", (2, 3): "pair"},
        "bytes": b"\0\xff",
        "tagged": {"__type__": "tuple", "items": [1]},
        "numbers": {np.int64(3): np.bool_(True)},
    }
    assert decode_state(encode_state(state)) == state
    tensor = decode_state(encode_state(torch.arange(6).reshape(2, 3)))
    assert torch.equal(tensor, torch.arange(6).reshape(2, 3))
    array = decode_state(encode_state(np.linspace(0, 1, 3)))
    assert np.array_equal(array, np.linspace(0, 1, 3)) and array.flags.writeable
