"""A sequence as TensorBoard shows it: its text, and what is learnt of a conversation."""

from pathlib import Path

import data_runs
import torch

from torchtitan.data.sample import sequence_text, text_of
from torchtitan.data.tokenizers import build_tokenizer
from torchtitan.models.batch import IGNORE_INDEX

BYTES = build_tokenizer("bytes")


def test_special_tokens_have_their_name_and_control_characters_none() -> None:
    ids = BYTES.encode("a\x1b[31mb", bos=True, eos=True)
    assert text_of(ids, BYTES) == "<start>a\\x1b[31mb<end>"


def test_a_sequence_of_text_ends_with_its_last_label_and_without_padding() -> None:
    ids = BYTES.encode("no padding", bos=True, eos=True)
    tokens = torch.tensor([*ids[:-1], 0, 0])
    labels = torch.tensor([*ids[1:], IGNORE_INDEX, IGNORE_INDEX])
    assert sequence_text(tokens, labels, BYTES, marks=False) == "<start>no padding<end>"


def test_what_is_learnt_of_a_conversation_is_marked() -> None:
    """The end of an answer is a label alone where the next conversation follows at once."""
    question, answer, next_one = (list(text.encode()) for text in ("q?", "yes.", "more?"))
    tokens = torch.tensor([*question, *answer[:-1], *next_one, 0])
    labels = torch.full_like(tokens, IGNORE_INDEX)
    labels[1:5] = torch.tensor(answer)
    labels[9] = ord("!")
    text = sequence_text(tokens, labels, BYTES, marks=True)
    assert text == "q?⟦yes.⟧more?⟦!⟧"


def test_of_a_long_sequence_a_part_is_decoded(tmp_path: Path) -> None:
    path = data_runs.write_jsonl(tmp_path, ["a long document " * 99])
    [loader] = data_runs.Run(data_runs.make_config(path)).loaders
    loader.next_step()
    assert loader.sample_text(9) == "<start>a long do"
    loader.close()


def test_nothing_is_shown_of_padding() -> None:
    tokens = torch.zeros(4, dtype=torch.int64)
    labels = torch.full_like(tokens, IGNORE_INDEX)
    assert sequence_text(tokens, labels, BYTES, marks=True) == ""
