"""A text file is a document, or several with a separator, however many lanes read it."""

import gzip
import io
import random
from collections import Counter

import numpy as np
import pytest
from data_runs import Run, make_config
from test_data_order import BOS, EOS, PAD, all_steps, lane_documents
from test_tokenize import tokenize

from torchtitan.data import pieces, sources_text
from torchtitan.data.registry import build_source
from torchtitan.data.sources_text import read_text
from torchtitan.data.tokenizers import build_tokenizer

SEPARATOR = "<|endoftext|>"


def make_books(folder, count=8, size=40 * 1024, form="txt"):
    """Files of lines, each with the number of its book and its own; returns their texts."""
    texts = []
    folder.mkdir(exist_ok=True)
    for book in range(count):
        lines = [f"book {book} line {line} 数学\n" for line in range(size // 20)]
        texts.append("".join(lines))
        content = texts[-1].encode()
        if form == "txt.gz":
            content = gzip.compress(content)
        (folder / f"{book}.{form}").write_bytes(content)
    return texts


def streams(config, num_lanes):
    """What each lane reads in an epoch, without padding."""
    steps = all_steps(config, num_lanes=num_lanes, global_batch=num_lanes)
    lanes = [steps[:, :, lane].reshape(-1) for lane in range(num_lanes)]
    return [tokens[tokens != PAD] for tokens in lanes]


@pytest.mark.parametrize("form", ["txt", "txt.gz"])
def test_documents_do_not_depend_on_the_lanes(tmp_path, form):
    texts = make_books(tmp_path / "books", form=form)
    config = make_config(str(tmp_path / "books"), epochs=1)
    for num_lanes in (1, 64):
        lanes = streams(config, num_lanes)
        targets = all_steps(config, num_lanes=num_lanes, global_batch=num_lanes, name="labels")
        assert np.count_nonzero(np.concatenate(lanes) == BOS) == len(texts), num_lanes
        assert np.count_nonzero(targets == EOS) == len(texts), num_lanes
        # Every line is there once, and whole: cuts are at line ends.
        words = build_tokenizer("bytes").decode([int(t) for lane in lanes for t in [*lane, 10]])
        assert Counter(words.split("\n")) - Counter([""] * 10**6) == Counter(
            line for text in texts for line in text.splitlines()
        )


def test_a_long_document_is_read_in_one_piece_by_a_lane(tmp_path, monkeypatch):
    """Pieces follow each other, shuffled or not, whole for the document mask."""
    monkeypatch.setattr(sources_text, "_PIECE_BYTES", 2000)
    texts = make_books(tmp_path / "books", count=6, size=9000)
    config = make_config(str(tmp_path / "books"), epochs=1, document_mask=True)
    assert {*lane_documents(all_steps(config, num_lanes=1, global_batch=1), 0)} == {*texts}
    run = Run(config, num_lanes=1, global_batch=1)
    ids = [step.flatten() for step in run.steps("document_ids")]
    borders = sum(int(np.count_nonzero(np.diff(part))) for part in ids)
    run = Run(config, num_lanes=1, global_batch=1)
    starts = [np.count_nonzero(step.flatten()[1:] == BOS) for step in run.steps()]
    padded = 1
    assert borders == sum(starts) + padded


@pytest.mark.parametrize("options", [{}, {"document_separator": "\n\n"}])
def test_resume_at_every_step_of_pieces(tmp_path, monkeypatch, options):
    monkeypatch.setattr(sources_text, "_PIECE_BYTES", 700)
    texts = make_books(tmp_path / "books", count=3, size=6000)
    (tmp_path / "books" / "short.txt").write_text("\n\n".join("abcdefgh" * 3))
    (tmp_path / "books" / "packed.txt.gz").write_bytes(gzip.compress(texts[0].encode() * 2))
    options = {"epochs": 2, "document_mask": True} | options
    config = make_config(str(tmp_path / "books"), **options)
    expected = {}
    for name in ("tokens", "labels", "document_ids"):
        run = Run(config)
        expected[name] = []
        states = []
        for step in run.steps(name):
            expected[name].append(step)
            states.append(run.lane_states)
    for k in range(0, len(states) - 1, 3):
        for name, steps in expected.items():
            resumed = Run(config, (1, 2, 4)[k % 3], lane_states=states[k])
            assert np.array_equal(resumed.step(name), steps[k + 1]), (k, name)
        assert resumed.lane_states == states[k + 1], k


@pytest.mark.parametrize("shared", [False, True])
def test_pieces_from_tokens_are_the_same_samples(tmp_path, monkeypatch, shared):
    """With what belongs together, which a document mask shows: nothing where lanes share a file
    that is read from the front, as each has every fourth piece of it."""
    monkeypatch.setattr(sources_text, "_PIECE_BYTES", 1500)
    monkeypatch.setattr("torchtitan.data.tokenize._SMALLEST_BYTES", 6000)
    monkeypatch.setattr("torchtitan.data.lanes._BLOCK_ROWS", 2)
    texts = make_books(tmp_path / "books", count=0 if shared else 3, size=9000)
    text = "".join(texts) or "".join(f"line {n}\n" for n in range(4000))
    (tmp_path / "books" / "packed.txt.gz").write_bytes(gzip.compress(text.encode()))
    assert tokenize(str(tmp_path / "books"), tmp_path / "tokens") == 0
    for name in ("tokens", "labels"):
        both = [
            np.stack(list(Run(make_config(str(path), epochs=1, document_mask=True)).steps(name)))
            for path in (tmp_path / "books", tmp_path / "tokens")
        ]
        assert np.array_equal(*both), name
    lane = streams(make_config(str(tmp_path / "tokens"), epochs=1), 1)[0]
    assert np.count_nonzero(lane == BOS) == len(texts) + 1


def test_separator(tmp_path):
    documents = [f"<{n}> " + "word " * (n % 50) for n in range(400)]
    (tmp_path / "a.txt").write_text(SEPARATOR.join([*documents, "\n"]))
    (tmp_path / "b.txt.gz").write_bytes(gzip.compress(f"{SEPARATOR}one{SEPARATOR}two".encode()))
    config = make_config(str(tmp_path), epochs=1, document_separator=SEPARATOR)
    for num_lanes in (1, 4):
        steps = all_steps(config, num_lanes=num_lanes, global_batch=num_lanes)
        seen = [text for lane in range(num_lanes) for text in lane_documents(steps, lane)]
        assert Counter(seen) == Counter([*documents, "one", "two"]), num_lanes


@pytest.mark.parametrize("separator", ["", SEPARATOR, "\n\n", "aa", "数"])
def test_cuts_lose_nothing_and_change_no_document(tmp_path, separator):
    """Texts that are hard on separators, cut in every way."""
    generator = random.Random(separator)
    bits = ["a", "aa", "\n", "\n\n\n", " ", "数学", "b" * 200, SEPARATOR[:5], separator]
    for case in range(6):
        text = "".join(generator.choices(bits, k=3000))
        (tmp_path / "a.txt").write_text(text)
        config = make_config(str(tmp_path / "a.txt"), document_separator=separator or None)
        source = build_source(config.training, config.data)
        content = text.encode()
        found = []
        for num_lanes in (1, 2, 5, 16):
            documents, unfinished = [], b""
            for shard in source.shards(num_lanes):
                size = generator.choice([64, 300, 4096])
                rows = read_text(
                    io.BytesIO(content[shard.start :][: shard.end - shard.start]),
                    shard.start,
                    shard.end,
                    size,
                    separator.encode(),
                    bool(separator) or shard.end == len(content),
                )
                for row in rows:
                    row.content.decode()  # cut between characters
                    assert content[row.place :].startswith(row.content)
                    assert row.begins == (not unfinished)
                    unfinished += row.content
                    if row.ends:
                        documents.append(unfinished)
                        unfinished = b""
            assert not unfinished
            found.append(documents)
        assert all(documents == found[0] for documents in found), case
        if not separator:
            assert found[0] == [content]
        kept = sum(content.count(byte) for byte in (b"b", "学".encode()))
        assert sum(d.count(b"b") + d.count("学".encode()) for d in found[0]) == kept


def test_a_missing_separator_is_searched_once(tmp_path, monkeypatch):
    """Not from every cut to the end of the file, which may be large."""
    searches = []

    def search(*args, **kwargs):
        searches.append(args)
        return next_document(*args, **kwargs)

    next_document = pieces._next_document
    monkeypatch.setattr(pieces, "_next_document", search)
    (tmp_path / "a.txt").write_text(SEPARATOR + "word\n" * 200_000)
    config = make_config(str(tmp_path / "a.txt"), document_separator=SEPARATOR)
    assert len(build_source(config.training, config.data).shards(64)) == 1 == len(searches)
