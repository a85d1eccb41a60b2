"""`torchtitan status`, on folders of real runs and on what is left of them."""

import json
import os
import shutil
import socket
from pathlib import Path
from typing import Any

import pytest

from tests.distributed import runs
from torchtitan.cli import main
from torchtitan.commands.status import _duration


@pytest.fixture(scope="module")
def ended(tmp_path_factory: pytest.TempPathFactory) -> Path:
    """The folder of a run of 10 steps, saved at 4, 8 and 10."""
    folder = tmp_path_factory.mktemp("ended") / "run"
    runs.run(folder)
    return folder


def report(folder: Path, capsys: pytest.CaptureFixture[str]) -> dict[str, Any]:
    assert main(["status", str(folder), "--json"]) == 0
    return json.loads(capsys.readouterr().out)


def test_a_run_that_has_ended(ended: Path, capsys: pytest.CaptureFixture[str]) -> None:
    found = report(ended, capsys)
    assert (found["state"], found["exit_code"]) == ("completed", 0)
    assert (found["step"], found["steps"], found["checkpoint"]) == (10, 10, 10)
    assert found["loss"] == runs.records(ended)[-1]["loss"]
    assert "expected_end" not in found and found["error"] is None
    assert main(["status", str(ended)]) == 0
    lines = dict(line.split(maxsplit=1) for line in capsys.readouterr().out.splitlines())
    assert lines["state"].startswith("completed, exit status 0; last sign ")
    assert lines["step"].startswith("10 of 10, loss ")
    assert lines["checkpoint"].startswith("step-10 (")
    assert " s a step, " in lines["rate"]


@pytest.mark.parametrize(
    ("pid", "state"),
    [(os.getpid(), "running"), (2**31 - 1, "killed")],
    ids=["running", "killed"],  # workers of the tests have the same names
)
def test_a_run_in_its_middle(
    ended: Path, tmp_path: Path, pid: int, state: str, capsys: pytest.CaptureFixture[str]
) -> None:
    """As it is after step 5, with its process alive, and with the process gone."""
    folder = tmp_path / "run"
    shutil.copytree(ended, folder)
    for step in (8, 10):
        shutil.rmtree(folder / "checkpoint" / f"step-{step}")
    lines = (folder / "metrics.jsonl").read_text().splitlines()[:5]
    (folder / "metrics.jsonl").write_text("\n".join(lines) + '\n{"step": 6, "lo')
    status = runs.status(folder) | {"status": "running", "step": 4, "exit_code": None}
    (folder / "run_status.json").write_text(json.dumps(status))
    (folder / ".lock").write_text(json.dumps({"host": socket.gethostname(), "pid": pid}))
    found = report(folder, capsys)
    assert (found["state"], found["step"], found["checkpoint"]) == (state, 5, 4)
    seconds = [json.loads(line)["step_seconds"] for line in lines]
    assert found["step_seconds"] == pytest.approx(sum(seconds) / 5)
    if state == "running":
        end = (folder / "metrics.jsonl").stat().st_mtime + sum(seconds)
        assert found["expected_end"] == pytest.approx(end)
    assert ("expected_end" in found) == (state == "running")
    assert main(["status", str(folder)]) == 0
    out = capsys.readouterr().out
    assert ("\nnext        the same command resumes from step-4\n" in out) == (state == "killed")


def test_a_run_that_failed(tmp_path: Path, capsys: pytest.CaptureFixture[str]) -> None:
    folder = tmp_path / "run"
    bad = ("--optimizer.lr=1e30", "--training.max_norm=inf", "--lr_scheduler.warmup_steps=0")
    runs.run(folder, *bad, expect=5)
    assert main(["status", str(folder)]) == 0
    out = capsys.readouterr().out
    assert out.startswith("state       failed, exit status 5; last sign ")
    assert "\nerror       step 2: the loss or the gradient norm is not finite" in out
    assert "\nnext" not in out, "the same step would fail again"


def test_a_folder_without_a_run(tmp_path: Path, capsys: pytest.CaptureFixture[str]) -> None:
    assert main(["status", str(tmp_path)]) == 2
    assert "holds no run" in capsys.readouterr().err


def test_durations_have_two_units() -> None:
    seconds = (0.4, 59, 61, 3600 * 3 + 60 * 12, 86400 * 2 + 3600 * 5)
    assert [*map(_duration, seconds)] == ["0 s", "59 s", "1 min 1 s", "3 h 12 min", "2 d 5 h"]
