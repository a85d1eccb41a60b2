"""The ledger: spans say where tokens come from, and starts replace what they train again."""

import json
import os
from pathlib import Path
from typing import Any

import numpy as np
import pytest
from test_bad_data import facts_for, only
from test_mixture import make_config, write_sources

from tests.chat_data import chat_config, chat_rows, pair_rows, write_rows
from torchtitan.commands.data_step import rows_of, tokens_of
from torchtitan.config import JobConfig
from torchtitan.data.ledger import DocumentSpan, Ledger, read_ledger, step_ranges
from torchtitan.data.loader import build_mixture
from torchtitan.data.tokenizers import build_tokenizer
from torchtitan.preflight.data import check_static

NUM_LANES = 4
KINDS = ["mixture", "text", "chat", "split", "pairs", "padded"]


@pytest.fixture(params=KINDS)
def config(request: pytest.FixtureRequest, tmp_path: Path) -> JobConfig:
    if request.param == "mixture":
        return make_config(write_sources(tmp_path))
    if request.param == "text":
        (tmp_path / "long.txt").write_text("".join(chr(97 + n * n % 26) for n in range(90_000)))
        training = {"seq_len": 64, "dataset_path": str(tmp_path / "long.txt")}
        return JobConfig.model_validate({"training": training})
    kinds: dict[str, dict[str, Any]] = {
        "split": {"on_long": "split", "seq_len": 64},
        "pairs": {"format": "preference"},
        "padded": {"packing": False},
    }
    rows = pair_rows(60) if request.param == "pairs" else chat_rows(60)
    return chat_config(write_rows(tmp_path, rows), epochs=2, **kinds.get(request.param, {}))


def test_the_spans_of_a_sequence_hold_its_tokens(config: JobConfig) -> None:
    tokenizer = build_tokenizer(config.model.tokenizer_path)
    mixture = build_mixture(config.training, config.data, 3, tokenizer, NUM_LANES)
    lanes = [mixture.lane(index, mixture.start()) for index in range(NUM_LANES)]
    samples = [sample for _ in range(6) for lane in lanes if (sample := lane.next_sample())]
    assert len(samples) > 6
    spans = [list(sample.spans) for sample in samples]
    rows = rows_of(mixture, {0: spans})
    for sample, own in zip(samples, spans, strict=True):
        parts = [tokens_of(mixture.sources[part.source], part, rows[part[:3]][1]) for part in own]
        assert np.array_equal(np.concatenate(parts), sample.tokens)
        assert [len(part) for part in parts] == [part.num_tokens for part in own]
    for lane in lanes:
        lane.close()


def span(place: int) -> DocumentSpan:
    return DocumentSpan(0, 1, place, 0, 8)


def write(folder: Path, after: int, rank: int, steps: range, lane: int) -> None:
    with Ledger(folder, after, rank, writes=True) as ledger:
        if rank == 0:
            ledger.prepare()
        for step in steps:
            ledger.record(step, step + 10, {lane: [(span(step),)]})
        ledger.flush()


def test_a_later_start_replaces_what_it_trains_again(tmp_path: Path) -> None:
    for rank, lane in ((0, 0), (1, 1)):
        write(tmp_path, 0, rank, range(1, 7), lane)
    write(tmp_path, 4, 0, range(5, 6), 0)
    write(tmp_path, 4, 0, range(5, 9), 0)  # once more from the same step
    found = read_ledger(tmp_path)
    assert list(found) == list(range(1, 9))
    assert [list(step.lanes) for step in found.values()] == [[0, 1]] * 4 + [[0]] * 4
    assert found[6].lanes == {0: [[span(6)]]} and found[6].data_step == 16


def test_a_start_that_keeps_no_ledger_counts(tmp_path: Path) -> None:
    write(tmp_path, 0, 0, range(1, 7), 0)
    Ledger(tmp_path, 4, 0, writes=False).prepare()
    assert list(read_ledger(tmp_path)) == [1, 2, 3, 4]


def test_a_line_that_was_cut_off_is_left_out(tmp_path: Path) -> None:
    write(tmp_path, 0, 0, range(1, 4), 0)
    (path,) = (tmp_path / "ledger").iterdir()
    path.write_text(path.read_text() + json.dumps({"step": 4})[:-1])
    assert list(read_ledger(tmp_path)) == [1, 2, 3]


def test_a_failure_to_write_ends_the_ledger_alone(
    tmp_path: Path, caplog: pytest.LogCaptureFixture
) -> None:
    ledger = Ledger(tmp_path / "gone", 0, 0, writes=True)
    with caplog.at_level("WARNING"):
        ledger.record(1, 1, {})
        ledger.record(2, 2, {})
    assert caplog.text.count("training continues") == 1


def test_a_disk_that_is_full_for_a_while_leaves_no_half_line(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    """It takes a part of a line without an error."""
    ledger, write = Ledger(tmp_path, 0, 0, writes=True), os.write
    ledger.prepare()
    with ledger:
        with monkeypatch.context() as patch:
            patch.setattr(os, "write", lambda file, data: write(file, bytes(data)[:9]))
            ledger.record(1, 1, {0: [(span(1),)]})
        ledger.record(2, 2, {0: [(span(2),)]})
    assert list(read_ledger(tmp_path)) == [1, 2]


def test_ranges_of_steps() -> None:
    assert step_ranges(["7", " 9-12 "]) == (range(7, 8), range(9, 13))
    for wrong in ("0", "5-3", "a", "1-", "-4", "1:3"):
        with pytest.raises(ValueError, match="is not a step"):
            step_ranges([wrong])


def test_a_wrong_range_is_reported(tmp_path: Path) -> None:
    (tmp_path / "a.txt").write_text("text " * 999)
    problems = check_static(facts_for(tmp_path, data__skip=["12-7"]))
    issue = only(problems)
    assert issue.key == "data.skip" and "12-7" in issue.problem and "1200-1300" in issue.fix
