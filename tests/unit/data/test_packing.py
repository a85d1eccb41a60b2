"""Samples cut from documents, and the tensors made of them."""

import numpy as np
import pytest

from torchtitan.data.packing import Packer, Piece, Position, Sample, make_batch
from torchtitan.models.batch import IGNORE_INDEX


def packer(lengths, seq_len):
    """Documents of the given lengths, whose tokens count up over the whole stream."""
    starts = np.cumsum([0, *lengths])
    documents = [
        Piece(Position(row=n), np.arange(start, start + length, dtype=np.int32))
        for n, (start, length) in enumerate(zip(starts, lengths))
    ]
    return Packer(iter(documents), seq_len)


def test_samples_overlap_by_one_token():
    cut = packer([3, 4, 2, 1], seq_len=4)
    (first, after_first), (second, after_second) = cut.next_sample(), cut.next_sample()
    assert first.tokens.tolist() == [0, 1, 2, 3, 4] and first.lengths == (3, 2)
    assert after_first == Position(row=1, token=1)
    assert second.tokens.tolist() == [4, 5, 6, 7, 8] and second.lengths == (3, 2)
    assert after_second == Position(row=2, token=1)
    (third, _) = cut.next_sample()
    assert third.tokens.tolist() == [8, 9]
    assert cut.next_sample() is None and cut.next_sample() is None


def test_document_longer_than_samples():
    cut = packer([11], seq_len=5)
    positions = []
    while (item := cut.next_sample()) is not None:
        positions.append((item[0].tokens.tolist(), item[1].token))
    assert positions == [([0, 1, 2, 3, 4, 5], 5), ([5, 6, 7, 8, 9, 10], 10)]


def test_batch_without_document_mask():
    sample = Sample(np.array([10, 11, 12, 13, 14], dtype=np.int32), (2, 3))
    batch = make_batch([sample], 4, document_mask=False, pad_id=0)
    assert batch["tokens"].tolist() == [[10, 11, 12, 13]]
    assert batch["labels"].tolist() == [[11, 12, 13, 14]]
    assert batch["positions"].tolist() == [[0, 1, 2, 3]]
    assert batch["document_ids"].tolist() == [[0, 0, 1, 1]]
    assert all(str(tensor.dtype) == "torch.int64" for tensor in batch.values())


def test_document_mask_ignores_the_seam():
    sample = Sample(np.array([10, 11, 12, 13, 14], dtype=np.int32), (2, 2, 1))
    batch = make_batch([sample], 4, document_mask=True, pad_id=0)
    assert batch["labels"].tolist() == [[11, IGNORE_INDEX, 13, IGNORE_INDEX]]
    assert batch["positions"].tolist() == [[0, 1, 0, 1]]
    assert batch["document_ids"].tolist() == [[0, 0, 1, 1]]


@pytest.mark.parametrize("document_mask", [False, True])
def test_padding_has_no_targets_and_is_a_document_of_its_own(document_mask):
    sample = Sample(np.array([10, 11, 12], dtype=np.int32), (3,))
    batch = make_batch([sample, None], 5, document_mask, pad_id=9)
    assert batch["tokens"].tolist() == [[10, 11, 12, 9, 9], [9] * 5]
    assert batch["labels"].tolist() == [[11, 12] + [IGNORE_INDEX] * 3, [IGNORE_INDEX] * 5]
    assert batch["document_ids"].tolist() == [[0, 0, 0, 1, 1], [0] * 5]
    expected = [0, 1, 2, 0, 1] if document_mask else [0, 1, 2, 3, 4]
    assert batch["positions"][0].tolist() == expected


def test_one_pass_against_a_slow_reading():
    """Random documents: labels, positions and ids as a loop over tokens gives them."""
    generator = np.random.default_rng(3)
    for _ in range(50):
        lengths = generator.integers(1, 12, size=6).tolist()
        cut = packer(lengths, seq_len=7)
        owner = np.repeat(np.arange(6), lengths)
        start = 0
        while (item := cut.next_sample()) is not None:
            batch = make_batch([item[0]], 7, document_mask=True, pad_id=-1)
            for t, token in enumerate(batch["tokens"][0].tolist()):
                if token < 0:
                    break
                index = start + t
                more = index + 1 < len(owner)
                predicts = more and owner[index + 1] == owner[index]
                assert token == index
                assert batch["labels"][0, t] == (index + 1 if predicts else IGNORE_INDEX)
                first = max(start, int(np.flatnonzero(owner == owner[index])[0]))
                assert batch["positions"][0, t] == index - first
                assert batch["document_ids"][0, t] == owner[index] - owner[start]
            start += 7
