"""Metrics never stop a run, whatever becomes of the places that they are written to."""

import logging
import subprocess
import sys
from pathlib import Path
from typing import Any

import pytest
from test_metrics import Clock, build, records, train


class Failing:
    """A sink that fails at its second record."""

    name = "failing"
    keeps_trying = False

    def __init__(self) -> None:
        self.calls: list[str] = []

    def resume(self, step: int) -> None:
        pass

    def write(self, record: dict[str, Any]) -> None:
        self.calls.append(f"write {record['step']}")
        if len(self.calls) == 2:
            raise OSError("gone")

    def flush(self) -> None:
        self.calls.append("flush")

    def close(self, failed: bool = False) -> None:
        self.calls.append(f"close {failed}")
        raise OSError("gone for good")


def test_a_sink_that_is_given_up_is_closed(
    tmp_path: Path, caplog: pytest.LogCaptureFixture
) -> None:
    """It may hold a process, a thread or the terminal."""
    sink = Failing()
    metrics = build(tmp_path, clock := Clock(), more_sinks={"failing": lambda: sink})
    train(metrics, clock, 1, 7)
    metrics.flush()
    metrics.close()
    assert sink.calls == ["write 1", "write 3", "close True"]
    assert len(caplog.messages) == 1 and "failing cannot be written" in caplog.text
    assert len(records(tmp_path)) == 4


def test_tensorboard_is_given_up_after_a_failure(
    tmp_path: Path, caplog: pytest.LogCaptureFixture
) -> None:
    (tmp_path / "tb").write_text("in the way")
    clock = Clock()
    metrics = build(tmp_path, clock, enable_tensorboard=True)
    train(metrics, clock, 1, 1)
    (tmp_path / "tb").unlink()
    train(metrics, clock, 2, 7)
    assert not (tmp_path / "tb").exists() and len(records(tmp_path)) == 4
    assert "TensorBoard cannot be written" in caplog.text


def test_a_sink_that_cannot_be_opened_does_not_stop_the_run(
    tmp_path: Path, caplog: pytest.LogCaptureFixture
) -> None:
    (tmp_path / "metrics.jsonl").mkdir()
    (tmp_path / "tb").write_text("in the way")
    clock = Clock()
    metrics = build(tmp_path, clock, enable_tensorboard=True)
    metrics.resume(0)
    train(metrics, clock, 1, 7)
    metrics.flush()
    metrics.close()
    warnings = [r.getMessage() for r in caplog.records if r.levelno == logging.WARNING]
    assert [warning.split(" cannot")[0] for warning in warnings] == ["metrics.jsonl", "TensorBoard"]


FULL_DISK = """
import json, logging, resource, sys
from pathlib import Path
sys.path.insert(0, {tests!r})
import test_metrics as t

logging.basicConfig(stream=sys.stderr, format="%(levelname)s %(message)s")
folder = Path({folder!r})
clock = t.Clock()
metrics = t.build(folder, clock, steps=100, log_freq=1, enable_tensorboard=True)
t.train(metrics, clock, 1, 2)
metrics.flush()
# In the middle of the next line of metrics.jsonl, the disk is full.
size = (folder / "metrics.jsonl").stat().st_size
resource.setrlimit(resource.RLIMIT_FSIZE, (size + 50, resource.RLIM_INFINITY))
t.train(metrics, clock, 3, 20)
metrics.flush()
resource.setrlimit(resource.RLIMIT_FSIZE, (resource.RLIM_INFINITY, resource.RLIM_INFINITY))
t.train(metrics, clock, 21, 22)
metrics.flush()
metrics.close()
print([record["step"] for record in t.records(folder)])
"""


def test_a_full_disk_costs_lines_but_neither_the_run_nor_the_file(tmp_path: Path) -> None:
    code = FULL_DISK.format(tests=str(Path(__file__).parent), folder=str(tmp_path))
    done = subprocess.run(
        [sys.executable, "-c", code], capture_output=True, text=True, timeout=120, check=False
    )
    assert done.returncode == 0, done.stderr
    assert done.stdout.strip() == "[1, 2, 21, 22]"
    # Each sink warns once, whatever follows.
    assert done.stderr.count("metrics.jsonl cannot be written") == 1
    assert done.stderr.count("WARNING TensorBoard cannot be written") <= 1
