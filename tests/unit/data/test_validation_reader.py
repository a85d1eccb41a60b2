"""A validation set is read to its end exactly once, whoever reads it."""

import re
from collections import Counter
from typing import Any

import numpy as np
import pytest
import torch
from data_runs import SEQ_LEN, make_documents, write_gz, write_jsonl
from torch.utils.data import IterableDataset

from torchtitan.config import DataError, JobConfig
from torchtitan.data import registry
from torchtitan.data.named_sources import validation_sets
from torchtitan.data.registry import register_dataset
from torchtitan.data.tokenizers import ByteTokenizer
from torchtitan.data.validation_reader import SetReader, build_reader
from torchtitan.models.batch import IGNORE_INDEX, Batch


def reader_of(
    path: str | None,
    dp: int = 1,
    rank: int = 0,
    max_sequences: int | None = None,
    mask: bool = False,
    **validation: Any,
) -> SetReader:
    section = {"enable": True, "dataset": "auto", "local_batch_size": 3, **validation}
    section["dataset_path"] = path
    config = JobConfig.model_validate(
        {
            # A set keeps its order and ends, whatever is trained on.
            "data": {"shuffle": True, "lanes": 5},
            "training": {"seq_len": SEQ_LEN, "document_mask": mask},
            "validation": section,
        }
    )
    (named,) = validation_sets(config)
    return build_reader(
        named,
        ByteTokenizer(),
        num_lanes=config.validation.lanes,
        max_sequences=max_sequences,
        dp_degree=dp,
        dp_rank=rank,
    )


def read(reader: SetReader) -> list[Batch]:
    steps = reader.start()
    batches = []
    try:
        while not (data := steps.next_step()).ended:
            batches += data.microbatches
        assert steps.next_step().ended  # and for ever
    finally:
        steps.close()
    return batches


def sequences(batches: list[Batch]) -> Counter[bytes]:
    """What a sequence is made of, and how often it occurs; without padding."""
    rows: Counter[bytes] = Counter()
    for batch in batches:
        assert batch["tokens"].shape == (3, SEQ_LEN)
        for row in range(3):
            if (batch["labels"][row] != IGNORE_INDEX).any():
                rows[b"".join(batch[name][row].numpy().tobytes() for name in sorted(batch))] += 1
    return rows


def targets(batches: list[Batch]) -> Counter[int]:
    labels = np.concatenate([batch["labels"].numpy().ravel() for batch in batches])
    return Counter(labels[labels != IGNORE_INDEX].tolist())


@pytest.mark.parametrize("mask", [False, True])
def test_every_token_once(dataset, mask: bool):
    """Counted against the documents alone: every byte of every document is a target once."""
    path, documents = dataset
    counted = targets(read(reader_of(path, mask=mask)))
    expected = Counter(b"".join(text.encode() for text in documents))
    first = counted.pop(ByteTokenizer.bos_id, 0)
    assert counted.pop(ByteTokenizer.eos_id) == len(documents)
    assert counted == expected
    # A start token is predicted from the document before, which a lane's first does not have.
    assert first == 0 if mask else len(documents) - 64 <= first < len(documents)


@pytest.mark.parametrize("dp", [2, 3, 4, 11])
def test_the_same_sequences_on_any_number_of_ranks(dataset, dp: int):
    path, _ = dataset
    alone = sequences(read(reader_of(path)))
    assert alone and set(alone.values()) == {1}
    together: Counter[bytes] = Counter()
    for rank in range(dp):
        together += sequences(read(reader_of(path, dp, rank)))
    assert together == alone


def test_a_set_keeps_its_order(tmp_path):
    path = write_jsonl(tmp_path, make_documents(200))
    labels = torch.cat([batch["labels"].flatten() for batch in read(reader_of(path, lanes=1))])
    text = ByteTokenizer().decode(labels[labels != IGNORE_INDEX].tolist())
    assert [int(number) for number in re.findall(r"<(\d+)>", text)] == list(range(200))


@pytest.mark.parametrize("workers", [1, 2])
def test_worker_processes_change_nothing(tmp_path, workers: int):
    path = write_gz(tmp_path, make_documents(200))
    own = reader_of(path, dp=2, rank=1, lanes=8)
    others = reader_of(path, dp=2, rank=1, lanes=8, dataloader={"num_workers": workers})
    for batch, expected in zip(read(others), read(own), strict=True):
        assert all(torch.equal(batch[name], expected[name]) for name in expected)


def test_every_pass_is_the_same_and_draws_no_random_number(tmp_path):
    reader = reader_of(write_jsonl(tmp_path, make_documents(200)))
    state = torch.get_rng_state()
    first = sequences(read(reader))
    assert torch.equal(torch.get_rng_state(), state)
    assert sequences(read(reader)) == first


def test_a_pass_that_was_given_up_leaves_the_next_one_whole(tmp_path):
    reader = reader_of(write_jsonl(tmp_path, make_documents(200)))
    steps = reader.start()
    steps.next_step()
    steps.close()
    assert steps.next_step().ended
    assert len(sequences(read(reader))) > 10


@pytest.mark.parametrize("dp", [1, 2, 3])
@pytest.mark.parametrize("most", [1, 7, 21])
def test_a_cap_is_the_same_sequences_on_any_number_of_ranks(tmp_path, dp: int, most: int):
    path = write_jsonl(tmp_path, make_documents(400))
    rows: Counter[bytes] = Counter()
    for rank in range(dp):
        rows += sequences(read(reader_of(path, dp, rank, max_sequences=most, lanes=4)))
    assert rows.total() == most
    assert rows == sequences(read(reader_of(path, max_sequences=most, lanes=4)))


@pytest.mark.parametrize("count", [1, 3])
def test_fewer_documents_than_lanes(tmp_path, count: int):
    path = write_gz(tmp_path, make_documents(count))  # one of its two files has no row
    rows: Counter[bytes] = Counter()
    for rank in range(4):
        rows += sequences(read(reader_of(path, 4, rank)))
    assert rows == sequences(read(reader_of(path))) and rows.total() >= 1


class Endless(IterableDataset):
    def __iter__(self):
        number = 0
        while True:
            yield {"text": f"row {number} " * 9}
            number += 1


def test_an_endless_stream_up_to_its_cap(monkeypatch):
    monkeypatch.setattr(registry.DATASETS, "_registered", dict(registry.DATASETS._registered))
    register_dataset("endless", lambda training, data: Endless())
    alone = sequences(read(reader_of(None, dataset="endless", max_sequences=10)))
    assert alone.total() == 10
    together: Counter[bytes] = Counter()
    for rank in range(3):
        options = {"dataset": "endless", "max_sequences": 10}
        together += sequences(read(reader_of(None, 3, rank, **options)))
    assert together == alone


def test_lanes_by_default_and_by_hand(tmp_path):
    path = write_gz(tmp_path, make_documents(200))
    assert reader_of(path).num_lanes == 8  # two files
    assert reader_of(path, lanes=3).num_lanes == 3
    lines = write_jsonl(tmp_path, make_documents(20_000))
    assert reader_of(lines).num_lanes == 16  # the pieces of one file


def test_ranks_can_tell_that_they_see_other_data(tmp_path):
    fingerprints = set()
    for count in (20, 21):
        folder = tmp_path / str(count)
        folder.mkdir()
        fingerprints.add(reader_of(write_jsonl(folder, make_documents(count))).fingerprint)
    assert len(fingerprints) == 2


def test_a_bad_row_is_told_with_its_place(tmp_path):
    path = write_jsonl(tmp_path, make_documents(20))
    with open(path, "a") as file:
        file.write("not json\n")
    with pytest.raises(DataError, match=r"data\.jsonl.*on_bad_row"):
        read(reader_of(path))
