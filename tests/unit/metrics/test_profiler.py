"""Traces: where they lie, which steps are in them, that failing to write one is no disaster."""

import json
import logging
from pathlib import Path
from typing import Any

import pytest
import torch
from torch.profiler import record_function

from torchtitan.config.schema import Profiling
from torchtitan.metrics.profiler import Profiler

CPU = torch.device("cpu")


def train(folder: Path, start: int, end: int, rank: int = 0, **section: Any) -> None:
    settings = {"enable_profiling": True, "profile_freq": 4, "profiler_warmup": 1, **section}
    profiler = Profiler(Profiling(**settings), folder, rank=rank, device=CPU, start_step=start)
    with profiler:
        for step in range(start + 1, end + 1):
            with record_function(f"step-{step}"):
                torch.randn(8, 8) @ torch.randn(8, 8)
            profiler.step()


def traces(folder: Path) -> list[str]:
    return sorted(str(path.relative_to(folder)) for path in folder.rglob("*.json"))


def steps_in(path: Path) -> set[str]:
    names = {event.get("name", "") for event in json.loads(path.read_text())["traceEvents"]}
    assert "aten::mm" in names
    return {name for name in names if name.startswith("step-")}


def test_traces_by_iteration_and_rank(tmp_path: Path) -> None:
    train(tmp_path, 0, 10, rank=3, profiler_active=2, save_traces_folder="traces")
    files = [f"traces/iteration_{step}/rank3_trace.json" for step in (4, 8)]
    assert traces(tmp_path) == files
    assert steps_in(tmp_path / files[0]) == {"step-3", "step-4"}
    assert steps_in(tmp_path / files[1]) == {"step-7", "step-8"}


def test_a_resumed_run_traces_the_same_steps(tmp_path: Path) -> None:
    train(tmp_path, 5, 9)
    assert traces(tmp_path) == ["profile_trace/iteration_8/rank0_trace.json"]
    assert steps_in(tmp_path / traces(tmp_path)[0]) == {"step-8"}


def test_off_by_default(tmp_path: Path) -> None:
    train(tmp_path, 0, 8, enable_profiling=False)
    assert list(tmp_path.iterdir()) == []


def test_a_trace_that_cannot_be_written_does_not_stop_the_run(
    tmp_path: Path, caplog: pytest.LogCaptureFixture
) -> None:
    (tmp_path / "profile_trace").write_text("in the way")
    train(tmp_path, 0, 8)
    warnings = [r.getMessage() for r in caplog.records if r.levelno == logging.WARNING]
    assert len(warnings) == 2 and "iteration_4" in warnings[0]
