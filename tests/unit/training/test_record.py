"""The record of a run's steps: lines that a crash has torn, later starts, and a full disk."""

import logging
from pathlib import Path
from types import SimpleNamespace
from typing import Any

import pytest
import torch

from torchtitan.checkpoint.remote import RUN_FILES
from torchtitan.metrics.sinks import JsonLinesSink
from torchtitan.parallel.digest import Digest
from torchtitan.training.recorder import Recorder
from torchtitan.training.step_record import read_records

DIGEST = Digest(2**64 - 1, float("nan"), (0.1, float("-inf")))


def start(path: Path, after: int, mesh: str) -> Recorder:
    """A start of a run that records every second step."""
    digests: Any = SimpleNamespace(take=lambda: {"w": DIGEST})
    recorder = Recorder(2, path, after, {"mesh": mesh}, digests, is_main=True)
    recorder.prepare()
    return recorder


def record(recorder: Recorder, *steps: int) -> None:
    for step in steps:
        recorder.record(step, torch.tensor(step + 0.1), torch.tensor(float("inf")))


def test_a_torn_line_and_a_start_from_an_earlier_step(tmp_path: Path) -> None:
    path = tmp_path / "record.jsonl"
    assert read_records(path) == {}
    record(start(path, 0, "first"), *range(1, 9))
    with path.open("ab") as file:
        file.write(b'{"step": 10, "loss"')
    records = read_records(path)
    assert list(records) == [2, 4, 6, 8] and not records[2].is_finite
    assert records[4].loss == torch.tensor(4.1).item()
    assert repr(records[8].gradients["w"]) == repr(DIGEST)
    assert path.name in RUN_FILES, "the copy in an object store has it for the next machine"
    record(start(path, 5, "second"), 6)
    found = {step: entry.start["mesh"] for step, entry in read_records(path).items()}
    assert found == {2: "first", 4: "first", 6: "second"}


def test_a_full_disk_ends_the_record_only(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch, caplog: pytest.LogCaptureFixture
) -> None:
    path = tmp_path / "record.jsonl"
    recorder = start(path, 0, "first")
    record(recorder, 2)

    def fail(sink: JsonLinesSink, record: object) -> None:
        raise OSError("disk full")

    with monkeypatch.context() as patches, caplog.at_level(logging.WARNING):
        patches.setattr(JsonLinesSink, "write", fail)
        record(recorder, 4)
    assert "training continues" in caplog.text and "disk full" in caplog.text
    record(recorder, 6)
    assert list(read_records(path)) == [2]
