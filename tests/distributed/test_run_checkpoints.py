"""Whole runs that save beside training, start from a seed, or from another run's checkpoint."""

import os
import shutil
import subprocess
import sys
from pathlib import Path

import pytest

from tests.distributed import runs
from tests.forked import execute
from torchtitan.checkpoint.steps_folder import inspect_steps

ASYNC = "--checkpoint.async_mode=async"


@pytest.fixture(scope="module")
def uninterrupted(tmp_path_factory: pytest.TempPathFactory) -> Path:
    """Saves at steps 4, 8 and 10, not beside training."""
    folder = tmp_path_factory.mktemp("uninterrupted") / "run"
    runs.run(folder)
    return folder


def good_steps(folder: Path) -> list[int]:
    return [c.step for c in inspect_steps(folder / "checkpoint") if c.manifest]


@pytest.mark.fault("F02", "F05", "F06")
def test_killed_while_saving_beside_training(uninterrupted: Path, tmp_path: Path) -> None:
    """The same command goes on, and what comes of it is the uninterrupted run, bit by bit."""
    folder = tmp_path / "run"
    pinned = "--checkpoint.async_mode=async_with_pinned_mem"
    runs.run_killed(folder, pinned, "--checkpoint.interval=1")
    done = runs.run(folder, ASYNC)
    assert "Resumed from step " in done.stderr
    assert runs.curve(folder) == runs.curve(uninterrupted)
    assert good_steps(folder)[-1] == 10
    assert runs.status(folder)["status"] == "completed"


@pytest.mark.fault("F23", "F27")
def test_refused_resume_leaves_the_folder_as_it_was(uninterrupted: Path, tmp_path: Path) -> None:
    """Also when it is refused late: config, status, metrics and steps stay, so that the first
    command still finds its run finished."""
    folder = tmp_path / "run"
    shutil.copytree(uninterrupted, folder)
    for shard in folder.rglob("*.distcp"):
        content = bytearray(shard.read_bytes())
        content[len(content) // 2] ^= 1
        shard.write_bytes(content)

    def snapshot() -> dict[Path, bytes]:
        return {path: path.read_bytes() for path in folder.rglob("*") if path.is_file()}

    before = snapshot()
    done = runs.run(folder, "--training.steps=12", "--job.description=later", expect=4)
    assert "content differs from what was written" in done.stderr
    assert snapshot() == before


_SCRIPT = """
import os, signal, sys, time
from torchtitan.checkpoint import store

real, fault = store.record_file, os.environ["FAULT"]


def record_file(path):
    at_step_2 = path.parent.name.startswith(".tmp-step-2-")
    if at_step_2 and fault == "stop":
        os.kill(os.getpid(), signal.SIGTERM)
    if at_step_2 and fault == "interrupt":
        stop = signal.getsignal(signal.SIGINT).__self__
        os.kill(os.getpid(), signal.SIGINT)
        while not stop.requested:
            time.sleep(0.01)
        os.kill(os.getpid(), signal.SIGINT)
        time.sleep(60)
    if fault == "fail":
        raise OSError(5, "Input/output error")
    time.sleep(0.3)
    return real(path)


store.record_file = record_file
from torchtitan.cli import main

status = main(["train", *sys.argv[1:]])
print("main returned", file=sys.stderr)  # then the interpreter waits for its threads
sys.exit(status)
"""


def run_with_fault(folder: Path, fault: str, *arguments: str) -> subprocess.CompletedProcess[str]:
    """Every save takes longer than a step."""
    command = runs.command(folder, ASYNC, *arguments)
    return execute(
        [sys.executable, "-c", _SCRIPT, *command[command.index("torchtitan.train") + 1 :]],
        env=runs.environment() | {"FAULT": fault},
    )


@pytest.mark.fault("F07")
def test_save_under_way_is_awaited_when_the_run_fails(tmp_path: Path) -> None:
    folder = tmp_path / "run"
    bad = ("--optimizer.lr=1e30", "--training.max_norm=inf", "--checkpoint.interval=1")
    done = run_with_fault(folder, "", *bad, "--lr_scheduler.warmup_steps=0")
    assert done.returncode == 5, done.stderr
    saved = good_steps(folder)
    assert saved, done.stderr
    # Before the process groups are gone and the run says how it ended.
    told = done.stderr.index(f"Saved step {saved[-1]}")
    assert told < done.stderr.index("the loss or the gradient norm is not finite")
    assert not list((folder / "checkpoint").glob(".tmp-*"))


@pytest.mark.fault("F07", "F14")
def test_save_under_way_is_awaited_when_the_job_is_asked_to_stop(tmp_path: Path) -> None:
    folder = tmp_path / "run"
    done = run_with_fault(folder, "stop", "--checkpoint.interval=2", "--training.steps=3000")
    assert done.returncode == 7, done.stderr
    status = runs.status(folder)
    assert status["status"] == "preempted"
    assert good_steps(folder)[-1] == status["step"]
    assert 2 in good_steps(folder)


@pytest.mark.fault("F05", "F14")
def test_a_second_interrupt_does_not_wait_for_the_save(tmp_path: Path) -> None:
    """The thread would write for a minute. Its step is not valid; the same command continues."""
    folder = tmp_path / "run"
    steps = ("--checkpoint.interval=1", "--training.steps=3")
    done = run_with_fault(folder, "interrupt", *steps)
    assert done.returncode == 130 and "main returned" not in done.stderr, done.stderr
    assert good_steps(folder) == [1]
    assert runs.status(folder)["exit_code"] == 130
    assert "Resumed from step 1" in run_with_fault(folder, "", *steps).stderr
    assert good_steps(folder) == [1, 2, 3]


@pytest.mark.fault("F08")
def test_save_that_fails_ends_the_run(tmp_path: Path) -> None:
    """Soon, and not when something is to be saved again."""
    folder = tmp_path / "run"
    rare = ("--checkpoint.interval=5000", "--checkpoint.enable_first_step_checkpoint")
    done = run_with_fault(folder, "fail", *rare, "--training.steps=5000")
    assert done.returncode == 4, done.stderr
    assert "the checkpoint of step 1 was not saved: rank 0: [Errno 5]" in done.stderr
    assert good_steps(folder) == []
    status = runs.status(folder)
    assert (status["status"], status["exit_code"]) == ("failed", 4)
    assert status["step"] < 5000


def test_run_from_a_seed(uninterrupted: Path, tmp_path: Path) -> None:
    """It is where the run would have started without one."""
    folder = tmp_path / "run"
    done = runs.run(folder, "--checkpoint.create_seed_checkpoint")
    assert good_steps(folder) == [0]
    assert runs.status(folder)["status"] == "seeded"
    assert not (folder / "metrics.jsonl").exists()
    done = runs.run(folder, ASYNC, processes=2)
    assert "Resumed from step 0" in done.stderr
    for row, expected in zip(runs.curve(folder), runs.curve(uninterrupted), strict=True):
        assert row == pytest.approx(expected, rel=2e-5)
    assert good_steps(folder) == [0, 4, 8, 10]


def test_another_run_goes_on(uninterrupted: Path, tmp_path: Path) -> None:
    """With everything that the checkpoint holds, its last steps are the first run's again."""
    path = uninterrupted / "checkpoint" / "step-4"
    start = (f"--checkpoint.initial_load_path={path}", "--checkpoint.initial_load_model_only=false")
    folder = tmp_path / "run"
    done = runs.run(folder, *start)
    assert f"continues from step 4 of {path}" in done.stderr
    assert runs.curve(folder) == runs.curve(uninterrupted)[4:]
    rows, expected = runs.records(folder)[-1], runs.records(uninterrupted)[-1]
    assert rows["num_tokens_seen"] == expected["num_tokens_seen"]
    assert good_steps(folder) == [8, 10]
    assert "The run is finished" in runs.run(folder, *start).stderr


def test_weights_of_another_run_start_anew(uninterrupted: Path, tmp_path: Path) -> None:
    path = os.path.relpath(uninterrupted / "checkpoint" / "step-10")
    folder = tmp_path / "run"
    runs.run(folder, f"--checkpoint.initial_load_path={path}", "--checkpoint.load_only")
    steps, losses, _ = zip(*runs.curve(folder), strict=True)
    assert steps == tuple(range(1, 11))
    assert losses[0] < runs.curve(uninterrupted)[3][1], "trained weights, and the first data"
    assert good_steps(folder) == []
