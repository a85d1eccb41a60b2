"""Records: what is in them, when the host waits for the device, what a resume keeps."""

import json
import logging
import math
import os
from collections.abc import Callable
from pathlib import Path
from typing import Any

import pytest
import torch
from tensorboard.backend.event_processing.event_accumulator import EventAccumulator
from torch.utils._python_dispatch import TorchDispatchMode

from torchtitan.config.schema import Metrics
from torchtitan.metrics import logger as metrics_module
from torchtitan.metrics.logger import MeasuredRun, MetricsLogger

CPU = torch.device("cpu")


class Clock:
    """Seconds that pass when told to."""

    def __init__(self) -> None:
        self.now = 1000.0

    def __call__(self) -> float:
        return self.now

    def wait(self, seconds: float) -> None:
        self.now += seconds


def build(
    folder: Path,
    clock: Clock | None = None,
    *,
    rank: int = 0,
    steps: int = 7,
    seconds_before: float = 0.0,
    more_sinks: dict[str, Any] | None = None,
    texts: Callable[[], dict[str, str]] = dict,
    **section: Any,
) -> MetricsLogger:
    run = MeasuredRun(folder, rank, 2, CPU, steps, 6e9, 3e9, seconds_before)
    section = {"log_freq": 3, **section}
    return MetricsLogger(Metrics(**section), run, more_sinks, clock or Clock(), texts=texts)


def train(metrics: MetricsLogger, clock: Clock, first: int, last: int) -> None:
    """Steps of 2 seconds, half a second of them waiting for data."""
    for step in range(first, last + 1):
        metrics.start_step()
        with metrics.timing("data"):
            clock.wait(0.5)
        clock.wait(1.5)
        loss, norm = torch.tensor(1 / step), torch.tensor(step + 0.1)
        metrics.log_step(
            step, loss=loss, grad_norm=norm, lr=0.1 * step, num_targets=90, num_tokens=100
        )


def records(folder: Path) -> list[dict[str, Any]]:
    return [json.loads(line) for line in (folder / "metrics.jsonl").read_text().splitlines()]


def scalars(folder: Path, tag: str) -> list[tuple[int, float]]:
    [run] = {file.parent for file in folder.rglob("*.tfevents.*")}
    events = EventAccumulator(str(run))
    events.Reload()
    return [(event.step, event.value) for event in events.Scalars(tag)]


def test_record(tmp_path: Path) -> None:
    clock = Clock()
    metrics = build(tmp_path, clock)
    clock.wait(100.0)  # set-up before the first step is not a step's time
    train(metrics, clock, 1, 7)
    metrics.close()

    first, _, sixth, last = written = records(tmp_path)
    assert [record["step"] for record in written] == [1, 3, 6, 7]
    assert first["loss"] == 1.0 and sixth["num_tokens_seen"] == 600
    # Floats in full: a float32 as the double it is.
    assert sixth["loss"] == torch.tensor(1 / 6).item()
    assert sixth["grad_norm"] == torch.tensor(6.1).item()
    assert sixth["lr"] == 0.1 * 6
    assert sixth["num_targets"] == 90
    for record in written:
        assert record["step_seconds"] == 2.0 and record["data_seconds"] == 0.5
        assert record["data_fraction"] == 0.25
        assert record["tokens_per_second"] == 100 / 2.0 / 2  # of a step, in 2 s, per device
        assert record["tflops"] == pytest.approx(6e9 * 25 / 1e12)
        assert record["mfu"] is None and record["mfu_causal"] is None
        assert record["memory_peak_gib"] > 0.01
    assert last["num_tokens_seen"] == 700


def test_terms_of_the_loss(tmp_path: Path) -> None:
    clock = Clock()
    metrics = build(tmp_path, clock)
    metrics.start_step()
    clock.wait(1.0)
    terms = {"cross_entropy": torch.tensor(2.5)}
    metrics.log_step(
        1, loss=3.0, grad_norm=1.0, lr=0.1, num_targets=1, num_tokens=1, loss_terms=terms
    )
    metrics.close()
    [record] = records(tmp_path)
    assert (record["loss"], record["loss/cross_entropy"]) == (3.0, 2.5)


def test_mfu_against_a_peak_that_is_set(
    tmp_path: Path, caplog: pytest.LogCaptureFixture, monkeypatch: pytest.MonkeyPatch
) -> None:
    caplog.set_level(logging.INFO)
    clock = Clock()
    train(build(tmp_path, clock, peak_tflops=0.5), clock, 1, 3)
    assert records(tmp_path)[-1]["mfu"] == pytest.approx(0.3) and "No MFU" not in caplog.text
    build(tmp_path / "unset")
    assert "No MFU" not in caplog.text  # on a CPU
    monkeypatch.setattr(metrics_module, "device_name", lambda device: "X1")
    build(tmp_path / "unknown")
    assert "No MFU: the peak of this device (X1) is not known. Set metrics" in caplog.text


def test_mfu_of_a_known_device(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(metrics_module, "device_name", lambda device: "NVIDIA A100-SXM4-80GB")
    clock = Clock()
    metrics = build(tmp_path, clock)
    train(metrics, clock, 1, 1)
    [record] = records(tmp_path)
    assert record["mfu"] == pytest.approx(6e9 * 25 / 312e12)
    assert record["mfu_causal"] == pytest.approx(3e9 * 25 / 312e12)


def test_time_between_steps_counts(tmp_path: Path) -> None:
    """Saving or evaluating after a step is part of what the next steps cost."""
    clock = Clock()
    metrics = build(tmp_path, clock)
    train(metrics, clock, 1, 3)
    with metrics.timing("checkpoint"):
        clock.wait(9.0)
    train(metrics, clock, 4, 6)
    record = records(tmp_path)[-1]
    assert record["step_seconds"] == (9.0 + 3 * 2.0) / 3
    assert record["checkpoint_seconds"] == 3.0
    assert record["tokens_per_second"] == pytest.approx(300 / 15 / 2)


class ReadsByTheHost(TorchDispatchMode):
    def __init__(self) -> None:
        super().__init__()
        self.count = 0

    def __torch_dispatch__(self, func: Any, types: Any, args: Any = (), kwargs: Any = None) -> Any:
        self.count += func is torch.ops.aten._local_scalar_dense.default
        return func(*args, **(kwargs or {}))


def test_the_host_waits_only_at_logged_steps(tmp_path: Path) -> None:
    clock = Clock()
    metrics = build(tmp_path, clock, steps=100)
    for step, expected in [(1, 2), (2, 0), (3, 2), (4, 0), (5, 0), (6, 2)]:
        with ReadsByTheHost() as reads:
            train(metrics, clock, step, step)
        assert reads.count == expected, step


def test_other_ranks_write_nothing_and_never_wait(tmp_path: Path) -> None:
    clock = Clock()
    metrics = build(tmp_path, clock, rank=1, enable_tensorboard=True)
    metrics.resume(0)
    with ReadsByTheHost() as reads:
        train(metrics, clock, 1, 7)
    metrics.flush()
    metrics.close()
    assert reads.count == 0 and list(tmp_path.iterdir()) == []
    assert metrics.num_tokens_seen == 700


def test_all_ranks_write_where_they_are_asked_to(tmp_path: Path) -> None:
    clock = Clock()
    settings = {"enable_tensorboard": True, "save_for_all_ranks": True}
    for rank in (0, 3):
        metrics = build(tmp_path, clock, rank=rank, **settings)
        metrics.resume(0)
        train(metrics, clock, 1, 7)
        metrics.close()
    own = tmp_path / "metrics" / "rank_3.jsonl"
    steps = [json.loads(line)["step"] for line in own.read_text().splitlines()]
    assert steps == [record["step"] for record in records(tmp_path)] == [1, 3, 6, 7]
    for rank in (0, 3):
        assert len(scalars(tmp_path / "tb" / tmp_path.name / f"rank_{rank}", "lr")) == 4

    metrics = build(tmp_path, clock, rank=3, **settings)
    metrics.resume(3)  # on each rank
    assert len(own.read_text().splitlines()) == 2


def test_more_sinks_are_opened_where_files_are_written(tmp_path: Path) -> None:
    told: list[Any] = []

    class Mine:
        name = "mine"
        keeps_trying = False

        def resume(self, step: int) -> None:
            told.append(("resume", step))

        def write(self, record: dict[str, Any]) -> None:
            told.append(("write", record["step"]))

        def flush(self) -> None:
            told.append("flush")

        def close(self, failed: bool = False) -> None:
            told.append(("close", failed))

    for rank in (0, 1):
        metrics = build(tmp_path, clock := Clock(), rank=rank, more_sinks={"mine": Mine})
        with pytest.raises(KeyError), metrics:
            metrics.resume(0)
            train(metrics, clock, 1, 1)
            metrics.flush()
            raise KeyError
    assert told == [("resume", 0), ("write", 1), "flush", ("close", True)]


def test_values_that_are_not_finite_are_null(tmp_path: Path) -> None:
    metrics = build(tmp_path, clock := Clock())
    metrics.start_step()
    clock.wait(1.0)
    loss, norm = torch.tensor(math.nan), torch.tensor(math.inf)
    metrics.log_step(1, loss=loss, grad_norm=norm, lr=0.1, num_targets=1, num_tokens=1)
    [record] = records(tmp_path)
    assert record["loss"] is None and record["grad_norm"] is None
    assert "NaN" not in (tmp_path / "metrics.jsonl").read_text()


def test_tensorboard_shows_the_same_under_tags(tmp_path: Path) -> None:
    clock = Clock()
    metrics = build(tmp_path, clock, enable_tensorboard=True, save_tb_folder="events")
    train(metrics, clock, 1, 3)
    metrics.close()
    record = records(tmp_path)[-1]
    shown = {
        "loss": record["loss"],
        "grad_norm": record["grad_norm"],
        "lr": record["lr"],
        "ntokens_seen": record["num_tokens_seen"],
        "throughput/tps_per_device": record["tokens_per_second"],
        "throughput/tflops_per_device": record["tflops"],
        "time_metrics/end_to_end(s)": record["step_seconds"],
        "time_metrics/data_loading(s)": record["data_seconds"],
        "time_metrics/data_loading(%)": 25.0,
        "memory/max_reserved(GiB)": record["memory_peak_gib"],
        "memory/max_reserved(%)": 100 * record["memory_peak_fraction"],
    }
    for tag, value in shown.items():
        assert scalars(tmp_path / "events", tag)[-1] == (3, pytest.approx(value, rel=1e-6)), tag


def test_console_line_of_the_ranks_that_are_shown(
    tmp_path: Path, caplog: pytest.LogCaptureFixture
) -> None:
    caplog.set_level(logging.INFO, logger="torchtitan")
    clock = Clock()
    metrics = build(tmp_path, clock, rank=1)
    train(metrics, clock, 1, 3)
    assert not (tmp_path / "metrics.jsonl").exists()
    lines = [record.getMessage() for record in caplog.records if "console" in record.name]
    assert len(lines) == 2
    for part in ("step: 3/7", "loss:   0.3333", "grad_norm:   3.1000", "lr: 3.00e-01", "tps: 25"):
        assert part in lines[1]
    assert "mfu" not in lines[1] and "\x1b" not in lines[1]


def test_flush_reaches_the_disk(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    synced = []

    def record_and_sync(descriptor: int) -> None:
        synced.append(os.fstat(descriptor).st_ino)
        fsync(descriptor)

    fsync = os.fsync
    clock = Clock()
    metrics = build(tmp_path, clock, enable_tensorboard=True)
    train(metrics, clock, 1, 1)
    monkeypatch.setattr(os, "fsync", record_and_sync)
    metrics.flush()
    assert synced == [(tmp_path / "metrics.jsonl").stat().st_ino]
    assert scalars(tmp_path / "tb", "ntokens_seen") == [(1, 100)]


def test_a_validation_is_a_record_of_its_own(
    tmp_path: Path, caplog: pytest.LogCaptureFixture
) -> None:
    caplog.set_level(logging.INFO, logger="torchtitan")
    clock = Clock()
    metrics = build(tmp_path, clock, enable_tensorboard=True)
    train(metrics, clock, 1, 3)
    with metrics.timing("validation"):
        clock.wait(6.0)
        metrics.log_validation(3, "web", torch.tensor(2.5, dtype=torch.float64), 1000)
        metrics.log_validation(3, "far", 800.0, 10)
    train(metrics, clock, 4, 6)
    metrics.close()
    _, _, web, far, after = records(tmp_path)
    assert web == {
        "step": 3,
        "validation/web/loss": 2.5,
        "validation/web/perplexity": math.exp(2.5),
        "validation/web/num_targets": 1000,
    }
    assert far["validation/far/perplexity"] is None  # more than a number can be
    assert after["validation_seconds"] == 2.0 and after["step_seconds"] == 4.0
    assert scalars(tmp_path / "tb", "validation/web/loss") == [(3, 2.5)]
    assert scalars(tmp_path / "tb", "validation/web/perplexity") == [
        (3, pytest.approx(math.exp(2.5), rel=1e-6))
    ]
    assert scalars(tmp_path / "tb", "time_metrics/validation(s)") == [(6, 2.0)]
    lines = [record.getMessage() for record in caplog.records if "console" in record.name]
    assert lines[2] == "step: 3/7  validation/web/loss: 2.5000  validation/web/perplexity: 12.1825"
    assert lines[3].endswith("validation/far/perplexity: inf")
