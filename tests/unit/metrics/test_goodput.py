"""Where the time of a run goes: every second once, over all starts of the run."""

import json
import logging
import math
from pathlib import Path
from typing import Any

import pytest
from test_metrics import Clock, build, records, scalars, train

from torchtitan.metrics.goodput import SHARE_PREFIX, TimeSplit, earlier_seconds


def shares(record: dict[str, Any]) -> dict[str, float]:
    found = {key: value for key, value in record.items() if key.startswith(SHARE_PREFIX)}
    assert math.isclose(sum(found.values()), 1.0, rel_tol=1e-12)
    return {key.removeprefix(SHARE_PREFIX): value for key, value in found.items()}


def seconds(record: dict[str, Any]) -> dict[str, float]:
    return {name: share * record["run_seconds"] for name, share in shares(record).items()}


def test_every_second_is_booked_once() -> None:
    clock = Clock()
    split = TimeSplit(clock, seconds_before=3.0)
    clock.wait(1.0)
    with split.spent("data"):  # before training begins, on its own name, too
        clock.wait(1.0)
    split.start_training()
    clock.wait(10.0)
    with split.spent("validation"):
        clock.wait(2.0)
        with split.spent("data"):  # belongs to the inner one
            clock.wait(3.0)
        clock.wait(1.0)
    clock.wait(5.0)
    expected = {"startup": 4, "compute": 15, "validation": 3, "data": 4, "checkpoint": 0}
    assert seconds(split.record()) == pytest.approx(expected)
    assert split.describe(0, 1) == (
        "Trained 1 step in 26s: 57.7% compute, 15.4% start-up, 15.4% data, 11.5% validation"
    )


def test_an_error_ends_what_it_interrupts() -> None:
    clock = Clock()
    split = TimeSplit(clock)
    split.start_training()
    with pytest.raises(OSError), split.spent("checkpoint"):
        clock.wait(1.0)
        raise OSError
    clock.wait(1.0)
    found = shares(split.record())
    assert found["checkpoint"] == found["compute"] == 0.5


def test_each_record_has_the_split_of_the_run(
    tmp_path: Path, caplog: pytest.LogCaptureFixture
) -> None:
    caplog.set_level(logging.INFO, logger="torchtitan")
    clock = Clock()
    metrics = build(tmp_path, clock, steps=6, enable_tensorboard=True, seconds_before=2.0)
    clock.wait(4.0)
    train(metrics, clock, 1, 3)
    with metrics.timing("checkpoint"):
        clock.wait(9.0)
    train(metrics, clock, 4, 6)
    with metrics.timing("checkpoint"):  # after the last record
        clock.wait(73.0)
    metrics.close()
    third, last = records(tmp_path)[1:]
    expected = {"startup": 6, "data": 1.5, "compute": 4.5, "checkpoint": 0}
    assert seconds(third) == pytest.approx(expected)
    assert third["run_seconds"] == 12
    expected = {"startup": 6, "data": 3, "compute": 9, "checkpoint": 9}
    assert seconds(last) == pytest.approx(expected)
    shown = scalars(tmp_path / "tb", "time_share/checkpoint(%)")
    assert shown[-1] == (6, pytest.approx(100 * 9 / 27))
    closing = caplog.records[-1].getMessage()
    assert closing == (
        "Trained 6 steps in 1m40s: 82.0% checkpoint, 9.0% compute, 6.0% start-up, 3.0% data"
    )


def test_later_starts_go_on_and_what_they_repeat_is_lost(
    tmp_path: Path, caplog: pytest.LogCaptureFixture
) -> None:
    caplog.set_level(logging.INFO, logger="torchtitan")
    clock = Clock()
    metrics = build(tmp_path, clock, steps=12, seconds_before=10.0)
    metrics.resume(0)
    train(metrics, clock, 1, 9)  # and then it dies: no close

    metrics = build(tmp_path, clock, steps=12, seconds_before=20.0)
    metrics.resume(6, num_tokens_seen=600)
    train(metrics, clock, 7, 12)
    metrics.close()
    last = records(tmp_path)[-1]
    assert caplog.records[-1].getMessage() == (
        "Trained 6 steps in 32s in this start, 12 steps in 1m00s in all:"
        " 50.0% start-up, 30.0% compute, 10.0% data, 10.0% lost"
    )
    # 6 steps of the first start, 6 of the second; 3 of the first were for nothing.
    expected = {"startup": 30, "data": 6, "compute": 18, "checkpoint": 0, "lost": 6}
    assert seconds(last) == pytest.approx(expected)

    metrics = build(tmp_path, clock, steps=12)
    metrics.resume(0)  # from the start: all was for nothing
    train(metrics, clock, 1, 1)
    expected = {"startup": 0, "data": 0.5, "compute": 1.5, "checkpoint": 0, "lost": 60}
    assert seconds(records(tmp_path)[-1]) == pytest.approx(expected)


def test_records_that_say_nothing_about_time_are_passed_over(tmp_path: Path) -> None:
    path = tmp_path / "metrics.jsonl"
    good = {"step": 2, "run_seconds": 4.0, "time_share/data": 0.25, "time_share/compute": 0.75}
    lines = ["{", "null", '{"step": 1}', json.dumps(good), '{"step": 3, "run_seconds": null}']
    path.write_text("\n".join(lines))
    assert earlier_seconds(path, 2) == {"data": 1.0, "compute": 3.0}
    assert earlier_seconds(path, 1) == {"lost": 4.0}


def test_a_file_that_cannot_be_read_does_not_stop_the_run(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch, caplog: pytest.LogCaptureFixture
) -> None:
    clock = Clock()
    train(build(tmp_path, clock), clock, 1, 3)

    def fail(path: Path) -> bytes:
        raise OSError("no")

    monkeypatch.setattr(Path, "read_bytes", fail)
    metrics = build(tmp_path, clock)
    metrics.resume(3)
    train(metrics, clock, 4, 6)
    assert "the time of earlier starts cannot be read, training continues" in caplog.text
