"""Ranks that refuse, stand still, die or fail: all others end soon, and say which it was."""

import os
import signal
import time
from collections.abc import Callable, Iterator, Sequence
from contextlib import contextmanager
from pathlib import Path
from typing import Any

import pytest

from tests.distributed import runs
from tests.forked import CONTEXT, launcher_variables, serve

BAD = "--model.args.n_heads=7"


class Rank:
    """A process of a run, forked, with its output in a file."""

    def __init__(self, words: Sequence[str], env: dict[str, str], output: Path):
        self._output = output
        args = (list(words), runs.environment() | env, "", [str(output)] * 2)
        self.process: Any = CONTEXT.Process(target=serve, args=args)
        self.process.start()

    def end(self, seconds: float = 60) -> tuple[int, str]:
        """The exit status and the output. `seconds` are less than ranks wait for each other."""
        self.process.join(seconds)
        assert self.process.exitcode is not None, self._output.read_text()
        return self.process.exitcode, self._output.read_text()


@contextmanager
def ranks_of(
    folder: Path, arguments: Sequence[Sequence[str]], env: Sequence[dict[str, str]] = ()
) -> Iterator[list[Rank]]:
    """One process for each of `arguments`, without a launcher that would look after them."""
    started = []
    try:
        for rank, variables in enumerate(env or launcher_variables(len(arguments))):
            words = runs.command(folder, *arguments[rank])[1:]
            started.append(Rank(words, variables, folder.parent / f"rank-{rank}"))
        yield started
    finally:
        for rank in started:
            rank.process.kill()
            rank.process.join()


def slurm(rank: int) -> dict[str, str]:
    """The variables of one of two tasks that srun starts on this machine."""
    step = {"SLURM_JOB_ID": str(os.getpid()), "SLURM_STEP_ID": "0", "SLURM_STEP_NUM_TASKS": "2"}
    return step | {"SLURM_PROCID": str(rank), "SLURM_LOCALID": str(rank), "SLURM_GTIDS": "0,1"}


def wait_until(condition: Callable[[], bool], seconds: float = 60) -> None:
    deadline = time.monotonic() + seconds
    while not condition():
        assert time.monotonic() < deadline
        time.sleep(0.01)


@pytest.mark.fault("F46", "F56")
@pytest.mark.parametrize(
    ("first", "second", "words"),
    [
        ((BAD,), (BAD,), "error: model.args.n_heads = 7"),
        # Only rank 0 looks at the run folder and at files.
        (("--optimizer.lr=0.1",), ("--optimizer.lr=0.1",), "is 0.0008 in the run that this"),
        (("--model.tokenizer_path=/nowhere",),) * 2 + ("error: model.tokenizer_path",),
        # Of this rank alone.
        ((), ("--job.custom_import=absent",), "job.custom_import"),
    ],
    ids=["config", "stored-run", "file", "one-rank"],
)
def test_a_refusal_ends_all_ranks_with_the_same_message(
    first: Sequence[str], second: Sequence[str], words: str, tmp_path: Path
) -> None:
    """Started as srun does. Nobody waits for the minutes that a start may take."""
    folder = tmp_path / "run"
    if "lr" in "".join(first):
        runs.run(folder, "--training.steps=1", "--lr_scheduler.warmup_steps=1")
    with ranks_of(folder, [first, second], [slurm(0), slurm(1)]) as ranks:
        for status, output in [rank.end() for rank in ranks]:
            assert status == 2, output
            assert output.count(words) == 1, output
            assert output.count("nothing was started") == 1, output


def test_processes_of_srun_are_ranks_of_one_run(tmp_path: Path) -> None:
    folder = tmp_path / "run"
    arguments = ("--training.steps=2", "--lr_scheduler.warmup_steps=1", "--checkpoint.enable=false")
    with ranks_of(folder, [arguments] * 2, [slurm(0), slurm(1)]) as ranks:
        (status, output), (second, _) = (rank.end() for rank in ranks)
    assert (status, second) == (0, 0), output
    assert "dp_shard 2" in output


@pytest.mark.fault("F42")
@pytest.mark.parametrize("stopped", [0, 1])
def test_a_rank_that_stands_still_is_named(stopped: int, tmp_path: Path) -> None:
    """The other waits `comm.train_timeout_seconds`, not the minutes that a start may take.

    Then the watchdog of the one that stands still ends it, with its stack in the report.
    """
    folder = tmp_path / "run"
    # Without checkpoints: a save sets the time anew after itself.
    arguments = ("--training.steps=100000", "--checkpoint.enable=false")
    arguments += ("--comm.train_timeout_seconds=2",)
    with ranks_of(folder, [arguments] * 2) as ranks:
        metrics = folder / "metrics.jsonl"
        wait_until(lambda: metrics.exists() and metrics.read_text().count("\n") > 2)
        os.kill(ranks[stopped].process.pid, signal.SIGSTOP)
        status, output = ranks[1 - stopped].end()
        assert ranks[stopped].end()[0] == 6, output
        report = folder / "hang.txt"
        wait_until(lambda: "stopped by a signal" in report.read_text())
    assert report.read_text().startswith(f"Rank {stopped} was late first"), report.read_text()
    assert "in train" in report.read_text().partition(f"\nrank {stopped} ")[2]
    assert status == 6, output
    name = "Rank 0 does not answer" if stopped == 0 else "Rank 1 did not arrive"
    assert name in output.splitlines()[-1], output
    stored = runs.status(folder)
    assert (stored["status"], stored["exit_code"]) == ("failed", 6)


@pytest.mark.fault("F01")
@pytest.mark.parametrize("killed", [0, 1])
def test_a_rank_that_is_killed_is_named(killed: int, tmp_path: Path) -> None:
    folder = tmp_path / "run"
    with ranks_of(folder, [("--training.steps=100000", "--checkpoint.enable=false")] * 2) as ranks:
        metrics = folder / "metrics.jsonl"
        wait_until(lambda: metrics.exists() and metrics.read_text().count("\n") > 2)
        ranks[killed].process.kill()
        status, output = ranks[1 - killed].end()
    assert status == 1, output
    assert f"Rank {killed} " in output.splitlines()[-1], output
    assert runs.status(folder)["status"] == "failed"


LEAVING = """
import os
from torchtitan.utils.garbage import GarbageCollection

end_step = GarbageCollection.step


def leave(self, step):
    end_step(self, step)
    if step == 2 and os.environ["RANK"] == "1":
        {}


GarbageCollection.step = leave
"""


@pytest.mark.parametrize(
    ("action", "statuses", "words"),
    [
        ("os._exit(0)", (1, 0), "Rank 1 ended without a word"),
        ("os.abort()", (6, 6), "Rank 1 was late first: aborted after step 2"),
    ],
    ids=["exit-0", "abort"],
)
def test_a_rank_that_leaves_early_fails_the_run(
    action: str, statuses: tuple[int, int], words: str, tmp_path: Path
) -> None:
    """Also with status 0; NCCL aborts after a timeout."""
    (tmp_path / "leaving.py").write_text(LEAVING.format(action))
    path = os.pathsep.join([str(tmp_path), runs.environment()["PYTHONPATH"]])
    env = [rank | {"PYTHONPATH": path} for rank in launcher_variables(2)]
    arguments = ("--job.custom_import=leaving", "--checkpoint.enable=false")
    with ranks_of(tmp_path / "run", [arguments] * 2, env) as ranks:
        (first, output), (second, _) = (rank.end() for rank in ranks)
    assert (first, second) == statuses, output
    assert words in output.splitlines()[-1], output
    stored = runs.status(tmp_path / "run")
    assert (stored["status"], stored["exit_code"]) == ("failed", first)


HUNGRY = """
import os
import torch
from torchtitan.utils.garbage import GarbageCollection

end_step = GarbageCollection.step


def grow(self, step):
    end_step(self, step)
    if step == 2 and os.environ.get("RANK", "1") == "1":
        torch.empty(1 << 50)


GarbageCollection.step = grow
"""


@pytest.mark.fault("F47")
@pytest.mark.parametrize("world_size", [1, 2])
def test_out_of_memory_is_told_with_its_status_on_all_ranks(
    world_size: int, tmp_path: Path
) -> None:
    (tmp_path / "hungry.py").write_text(HUNGRY)
    path = os.pathsep.join([str(tmp_path), runs.environment()["PYTHONPATH"]])
    variables: list[dict[str, str]] = [{}] if world_size == 1 else launcher_variables(2)
    env = [rank | {"PYTHONPATH": path} for rank in variables]
    arguments = ("--job.custom_import=hungry", "--checkpoint.enable=false")
    with ranks_of(tmp_path / "run", [arguments] * world_size, env) as ranks:
        for status, output in [rank.end() for rank in ranks]:
            assert status == 8, output
            last = output.splitlines()[-1]
            assert "out of memory" in last and "docs/guides/memory.md" in last, output
            assert "Traceback" not in output
    first = (tmp_path / "rank-0").read_text()
    assert ("Rank 1 failed first" in first) == (world_size == 2)
    assert runs.status(tmp_path / "run")["exit_code"] == 8


SLOW_DISK = """
import pathlib, time
from torch.distributed.checkpoint import FileSystemWriter

write_data = FileSystemWriter.write_data


def write_slowly(self, plan, planner):
    pathlib.Path(__file__).with_name("saving").touch()
    time.sleep(20)
    return write_data(self, plan, planner)


FileSystemWriter.write_data = write_slowly
"""


@pytest.mark.fault("F14", "F48")
def test_second_ctrl_c_in_a_save_interrupts(tmp_path: Path) -> None:
    """Whatever the error is that torch's writer makes of it."""
    (tmp_path / "slow.py").write_text(SLOW_DISK)
    path = os.pathsep.join([str(tmp_path), runs.environment()["PYTHONPATH"]])
    arguments, env = ("--job.custom_import=slow",), {"PYTHONPATH": path}
    with ranks_of(tmp_path / "run", [arguments], [env]) as (rank,):
        wait_until((tmp_path / "saving").exists)
        for _ in range(2):
            os.kill(rank.process.pid, signal.SIGINT)
            time.sleep(0.1)
        status, output = rank.end()
    assert status == 130, output
    assert "Traceback" not in output
    stored = runs.status(tmp_path / "run")
    assert (stored["status"], stored["exit_code"]) == ("failed", 130)
