"""Memory snapshots: when they are written. CUDA's history itself is tested on a GPU only."""

import logging
from pathlib import Path
from typing import Any

import pytest
import torch

from torchtitan.config.schema import Profiling
from torchtitan.metrics.profiler import Profiler

CPU = torch.device("cpu")


@pytest.fixture
def cuda(monkeypatch: pytest.MonkeyPatch) -> list[Any]:
    """What CUDA's allocator was asked for: its functions need a GPU."""
    asked: list[Any] = []

    def record(enabled: str | None = "all", max_entries: int = 0) -> None:
        asked.append((enabled, max_entries))

    def dump(path: str) -> None:
        asked.append(Path(path))
        Path(path).write_bytes(b"blocks")

    monkeypatch.setattr(torch.cuda.memory, "_record_memory_history", record)
    monkeypatch.setattr(torch.cuda.memory, "_dump_snapshot", dump)
    return asked


def profiler(folder: Path, start: int = 0, **section: Any) -> Profiler:
    settings = {"enable_memory_snapshot": True, "profile_freq": 4, **section}
    return Profiler(Profiling(**settings), folder, rank=2, device=CPU, start_step=start)


def test_every_freq_steps(tmp_path: Path, cuda: list[Any]) -> None:
    with profiler(tmp_path, start=3, save_memory_snapshot_folder="blocks") as steps:
        for _ in range(6):
            steps.step()
    files = [
        tmp_path / "blocks" / f"iteration_{step}" / "rank2_memory_snapshot.pickle"
        for step in (4, 8)
    ]
    assert cuda == [("all", 100_000), *files, (None, 0)]
    assert all(file.read_bytes() == b"blocks" for file in files)


def test_when_memory_runs_out(tmp_path: Path, cuda: list[Any]) -> None:
    for error in (torch.OutOfMemoryError("of it"), ValueError("of another kind")):
        with pytest.raises(type(error)), profiler(tmp_path) as steps:
            steps.step()
            raise error
    file = tmp_path / "memory_snapshot" / "iteration_1_exit" / "rank2_memory_snapshot.pickle"
    assert [item for item in cuda if isinstance(item, Path)] == [file]


def test_off_by_default(tmp_path: Path, cuda: list[Any]) -> None:
    with profiler(tmp_path, enable_memory_snapshot=False) as steps:
        steps.step()
    assert cuda == []


def test_a_snapshot_that_cannot_be_written_does_not_stop_the_run(
    tmp_path: Path, cuda: list[Any], caplog: pytest.LogCaptureFixture
) -> None:
    (tmp_path / "memory_snapshot").write_text("in the way")
    with profiler(tmp_path) as steps:
        for _ in range(4):
            steps.step()
    warnings = [r.getMessage() for r in caplog.records if r.levelno == logging.WARNING]
    assert len(warnings) == 1 and "cannot be written, training continues" in warnings[0]


@pytest.mark.gpu
def test_a_snapshot_of_a_gpu_has_its_blocks(tmp_path: Path) -> None:
    with profiler(tmp_path, profile_freq=1) as steps:
        held = torch.zeros(2**20, device="cuda")
        steps.step()
    file = tmp_path / "memory_snapshot" / "iteration_1" / "rank2_memory_snapshot.pickle"
    assert b"test_memory_snapshot.py" in file.read_bytes() and held.is_cuda
