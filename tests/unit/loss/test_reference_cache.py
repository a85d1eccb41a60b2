"""Log-probabilities by the content of answers: wherever they stand, and of no others."""

from pathlib import Path

import numpy as np
import pytest
import torch

from tests.distributed import tiny
from torchtitan.config import DataError
from torchtitan.data.packing import Sample, make_batch
from torchtitan.loss.preference import REFERENCE
from torchtitan.loss.reference_cache import CachedLogProbs, answer_keys
from torchtitan.models.batch import IGNORE_INDEX, Batch

ANSWERS = ([5, 6, 7], [5, 6, 8, 9], [3, 3], [3, 4])


def sample(*documents: list[int]) -> Sample:
    """Documents of one row, of which all but the first token are trained."""
    lengths = tuple(map(len, documents))
    trained = np.array([n > 0 for document in documents for n in range(len(document))])
    tokens = np.array([token for document in documents for token in document], dtype=np.int32)
    return Sample(tokens, lengths, parts=lengths, trained=trained)


def batch_of(*rows: Sample, seq_len: int = 12) -> Batch:
    return make_batch(rows, seq_len, document_mask=True, pad_id=0)


def test_a_key_is_that_of_the_answer_wherever_it_stands() -> None:
    packed = answer_keys(batch_of(sample(*ANSWERS)))
    alone = answer_keys(batch_of(sample(*ANSWERS[2:]), sample(*ANSWERS[:2]), seq_len=5))
    full = answer_keys(batch_of(sample(*ANSWERS), seq_len=7))  # no padding
    assert packed[0, :2].tolist() == alone[[1, 0], 0].tolist() == full[0, :2].tolist()
    assert len({*packed[0, :2].flatten().tolist()}) == 4
    assert not packed[0, 2:].any() and not alone[:, 1:].any()


def test_prompt_and_targets_count() -> None:
    batch = batch_of(sample([5, 6, 7], [5, 6, 8]))
    keys = answer_keys(batch)
    other = batch_of(sample([4, 6, 7], [5, 6, 8]))
    assert (answer_keys(other) != keys).flatten().tolist()[:2] == [True, False]
    batch["labels"][0, 0] = IGNORE_INDEX
    assert (answer_keys(batch) != keys).flatten().tolist()[:2] == [True, False]


def recorded() -> Batch:
    batch = tiny.pairs()
    keys = answer_keys(batch)
    values = torch.arange(keys.numel(), dtype=torch.float64).view_as(keys)
    return Batch({**batch, REFERENCE: values.masked_fill(keys == 0, 0)})


def test_what_was_recorded_is_found_again(tmp_path: Path) -> None:
    """In another order, by another process; several have recorded a part each, one of them none."""
    whole = recorded()
    halves = [Batch({name: t[rows] for name, t in whole.items()}) for rows in ([0, 1], range(2, 8))]
    nothing = CachedLogProbs.of([tiny.pairs()])
    parts = [nothing, *(CachedLogProbs.of([half]) for half in halves)]
    CachedLogProbs.merged(parts).write(tmp_path / "new" / "file")
    read = CachedLogProbs.read(tmp_path / "new" / "file")
    assert read is not None
    batch = Batch({name: tensor.flip(0) for name, tensor in tiny.pairs().items()})
    assert torch.equal(read.annotated(batch)[REFERENCE], whole[REFERENCE].flip(0))


@pytest.mark.parametrize("known", [[], [recorded()]], ids=["nothing", "others"])
def test_an_unknown_answer_is_an_error(known: list[Batch]) -> None:
    with pytest.raises(DataError, match="an answer was not there"):
        CachedLogProbs.of(known).annotated(batch_of(sample(*ANSWERS)))


def test_a_damaged_file_holds_nothing(tmp_path: Path) -> None:
    path = tmp_path / "file"
    CachedLogProbs.of([recorded()]).write(path)
    path.write_bytes(path.read_bytes()[:100])
    assert CachedLogProbs.read(path) is None is CachedLogProbs.read(tmp_path / "none")
