"""Chat data in lanes: whole conversations, exact on every mesh and after every stop."""

import itertools
from collections import Counter
from pathlib import Path
from typing import Any

import numpy as np
import pytest

from tests.chat_data import (
    SEQ_LEN,
    ChatRun,
    all_steps,
    chat_config,
    chat_rows,
    pair_rows,
    texts,
    write_rows,
)
from torchtitan.data.chat_encoder import Unit
from torchtitan.data.packing import Position
from torchtitan.data.row_packing import RowPacker, RowRule, Units

NUM_ROWS = 80
KINDS: dict[str, dict[str, Any]] = {
    "packed": {},
    "padded": {"packing": False},
    "split": {"on_long": "split", "seq_len": 64},
    "pairs": {"format": "preference"},
}


@pytest.fixture(params=KINDS)
def config(request: pytest.FixtureRequest, tmp_path: Path) -> Any:
    rows = pair_rows(NUM_ROWS) if request.param == "pairs" else chat_rows(NUM_ROWS)
    return chat_config(write_rows(tmp_path, rows), epochs=2, **KINDS[request.param])


def test_the_same_rows_on_every_mesh_and_after_every_stop(config: Any) -> None:
    """A resume is at every step, with another degree each time."""
    run = ChatRun(config)
    steps, states = [], []
    for step in run.steps():
        steps.append(step)
        states.append(run.lane_states)
    run.close()
    assert len(steps) > 4
    assert any("taken" in state for lanes in states for state in lanes.values())
    assert all_steps(config, 4, local=1) == steps
    for number, dp in zip(range(len(steps) - 1), itertools.cycle([2, 4, 1])):
        resumed = ChatRun(config, dp, states[number], local=1)
        assert resumed.step() == steps[number + 1], number
        assert resumed.lane_states == states[number + 1]
        resumed.close()
    resumed = ChatRun(config, 2, states[2])
    assert list(resumed.steps()) == steps[3:]
    resumed.close()


def test_worker_processes_do_not_matter(tmp_path: Path) -> None:
    path = write_rows(tmp_path, chat_rows(60))
    expected = all_steps(chat_config(path, epochs=1))
    assert all_steps(chat_config(path, 2, epochs=1)) == expected


@pytest.mark.parametrize("packing", [True, False])
@pytest.mark.parametrize("name", ["data.jsonl", "data.parquet"])
def test_every_conversation_is_whole_and_comes_once_an_epoch(
    tmp_path: Path, packing: bool, name: str
) -> None:
    rows = chat_rows(NUM_ROWS)
    config = chat_config(write_rows(tmp_path, rows, name), epochs=2, packing=packing, seq_len=400)
    seen: Counter[str] = Counter()
    trained: Counter[str] = Counter()
    for row in itertools.chain.from_iterable(all_steps(config)):
        seen.update(texts(row))
        trained.update(texts(row, trained=True))
        assert len(row[0]) <= 400
    expected: Counter[str] = Counter()
    answers: Counter[str] = Counter()
    for row in rows:
        turns = [(m["role"], m["content"]) for m in row["messages"]]
        text = "".join(f"<|im_start|>{role}\n{content}<|im_end|>\n" for role, content in turns)
        expected[text] += 2
        answers["".join(f"{c}<|im_end|>" for role, c in turns if role == "assistant")] += 2
    # The end token has no text, and the newline after the last turn is no input.
    assert {t.removesuffix("\n"): n for t, n in seen.items() if t} == {
        t.removesuffix("\n"): n for t, n in expected.items()
    }
    assert trained == answers


def test_pairs_are_adjacent_documents_of_one_row(tmp_path: Path) -> None:
    config = chat_config(write_rows(tmp_path, pair_rows(NUM_ROWS)), epochs=1, format="preference")
    run = ChatRun(config)
    seen = Counter[str]()
    for step in run.steps():
        for tokens, labels, documents, positions in step:
            row = (tokens, labels, documents, positions)
            starts = [n for n, p in enumerate(positions) if p == 0]
            assert [documents[n] for n in starts] == list(range(len(starts)))
            assert len(starts) % 2 == 0
            answers = texts(row, trained=True)
            for chosen, rejected, both in zip(answers[::2], answers[1::2], texts(row)[::2]):
                assert chosen.startswith("good ") and rejected.startswith("bad ")
                number = chosen.removeprefix("good ").removesuffix("<|im_end|>")
                assert f"p{number}<|im_end|>" in both
                seen[number] += 1
        for batch in run.batches:  # padding is a document of its own, without targets
            for ids, tokens in zip(batch["document_ids"].numpy(), batch["tokens"].numpy()):
                size = int((tokens != 258).sum())
                assert size == SEQ_LEN or np.all(ids[size:] == ids[:size].max(initial=-1) + 1)
    run.close()
    assert seen == Counter({str(n): 1 for n in range(NUM_ROWS)})


def test_a_mixture_of_text_and_chat_shares_whole_sequences(tmp_path: Path) -> None:
    chat = write_rows(tmp_path, chat_rows(NUM_ROWS), "chat.jsonl")
    text = write_rows(tmp_path, [{"text": "long text " * 40} for _ in range(60)], "text.jsonl")
    sources = [
        {"path": chat, "weight": 0.25, "format": "chat", "name": "chat"},
        {"path": text, "weight": 0.75, "name": "text"},
    ]
    config = chat_config(None, format="text", sources=sources)
    run = ChatRun(config)
    steps = [run.step() for _ in range(6)]
    states = run.lane_states
    after = [run.step() for _ in range(3)]
    resumed = ChatRun(config, 2, states)
    assert [resumed.step() for _ in range(3)] == after
    is_chat = ["<|im_start|>" in texts(row)[0] for step in steps for row in step or ()]
    assert sum(is_chat) == round(0.25 * len(is_chat))
    run.close()
    resumed.close()


def test_only_the_first_epoch_is_counted(tmp_path: Path) -> None:
    rows = chat_rows(40)
    rows[3]["messages"][1]["content"] = "x" * 2000
    for message in rows[5]["messages"]:
        message["train"] = False
    for on_long, expected in (("truncate_right", (1, 0, 1)), ("drop", (0, 1, 1))):
        config = chat_config(write_rows(tmp_path, rows), epochs=3, on_long=on_long, seq_len=400)
        run = ChatRun(config)
        list(run.steps())
        assert run.counts == expected
        run.close()


def units_of(sizes: list[int]) -> Any:
    def unit(size: int) -> Unit:
        return Unit(np.arange(size + 1, dtype=np.int32), np.ones(size + 1, bool), (size + 1,))

    return iter([Units(Position(row=n), (unit(size),)) for n, size in enumerate(sizes)])


def test_packing_fills_rows() -> None:
    generator = np.random.default_rng(0)
    sizes = np.clip(generator.lognormal(6, 0.8, 3000), 20, 2048).astype(int).tolist()
    packer = RowPacker(units_of(sizes), RowRule(2048, True, 0), 0)
    rows = 0
    while packer.next_sample() is not None:
        rows += 1
    assert sum(sizes) / (rows * 2048) > 0.95


def test_without_packing_rows_of_a_batch_are_of_like_length() -> None:
    generator = np.random.default_rng(0)
    sizes = np.clip(generator.lognormal(6, 0.8, 640), 20, 2048).astype(int).tolist()
    packer = RowPacker(units_of(sizes), RowRule(2048, False, 0), 0)
    given = [packer.next_sample() for _ in sizes]
    found = np.array([len(item[0].tokens) - 1 for item in given if item]).reshape(-1, 8)
    assert sorted(found.reshape(-1)) == sorted(sizes)
    assert found.sum() / (found.max(axis=1).sum() * 8) > 0.75  # in any order it is 0.45
    order = found.mean(axis=1)
    assert not np.all(np.diff(order[:8]) > 0)  # not from short to long in every window
