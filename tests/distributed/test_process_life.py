"""What ends the processes of a run, and what they leave."""

import os
import re
import signal
from pathlib import Path
from typing import Any

import pytest

from tests.distributed import runs
from tests.distributed.test_lost_ranks import ranks_of, wait_until
from tests.eval_tasks import write_tasks
from tests.forked import CONTEXT, execute, serve

LONG = ("--training.steps=100000", "--checkpoint.interval=100000")


def _lead(words: list[str], env: dict[str, str], outputs: list[str], pid_file: str) -> None:
    """Be a launcher: have a rank as a child, and its variables not in this process's own."""
    os.setsid()
    rank = os.fork()
    if rank:
        Path(pid_file).write_text(str(rank))
        os.waitpid(rank, 0)
        return
    serve(words, env, "", outputs)


class Started:
    """A run of one rank below a launcher, in a session of its own."""

    def __init__(self, folder: Path, *arguments: str, **env: str):
        self.folder, self._output = folder, folder.parent / "output"
        words = runs.command(folder, *LONG, *arguments)[1:]
        pid_file = folder.parent / "pid"
        args = (words, runs.environment() | env, [str(self._output)] * 2, str(pid_file))
        self.launcher: Any = CONTEXT.Process(target=_lead, args=args)
        self.launcher.start()
        metrics = folder / "metrics.jsonl"
        wait_until(lambda: metrics.exists() and metrics.read_text().count("\n") > 1)
        self.rank = int(pid_file.read_text())

    def output(self) -> str:
        return self._output.read_text()

    def is_alive(self) -> bool:
        stat = Path(f"/proc/{self.rank}/stat")
        return stat.exists() and stat.read_text().rpartition(")")[2].split()[0] != "Z"

    def __enter__(self) -> "Started":
        return self

    def __exit__(self, *details: object) -> None:
        if self.is_alive():
            os.kill(self.rank, signal.SIGKILL)
        self.launcher.kill()
        self.launcher.join()


def assert_saved(run: Started) -> None:
    wait_until(lambda: not run.is_alive(), seconds=20)
    status = runs.status(run.folder)
    assert (status["status"], status["exit_code"]) == ("preempted", 7), run.output()
    assert (run.folder / "checkpoint" / f"step-{status['step']}").is_dir()


@pytest.mark.fault("F16")
def test_rank_ends_with_its_launcher_and_saves(tmp_path: Path) -> None:
    """It got no signal of the launcher's, which was killed."""
    with Started(tmp_path / "run", TORCHELASTIC_RUN_ID="none") as run:
        os.kill(run.launcher.pid, signal.SIGKILL)
        assert_saved(run)
        assert f"launcher (process {run.launcher.pid}) is gone" in run.output()


def test_run_without_a_launcher_outlives_its_shell(tmp_path: Path) -> None:
    with Started(tmp_path / "run") as run:
        os.kill(run.launcher.pid, signal.SIGKILL)
        run.launcher.join()
        rows = len(runs.records(run.folder))
        wait_until(lambda: len(runs.records(run.folder)) > rows + 5)
        assert runs.status(run.folder)["status"] == "running"


@pytest.mark.fault("F15", "F16")
@pytest.mark.parametrize(
    ("number", "readers"), [(signal.SIGHUP, 1), (signal.SIGUSR1, 0)], ids=["HUP", "USR1"]
)
def test_signals_that_save_and_leave(number: int, readers: int, tmp_path: Path) -> None:
    """Sent to all processes, as a terminal does, so that the readers get it too."""
    with Started(tmp_path / "run", f"--training.dataloader.num_workers={readers}") as run:
        os.killpg(run.launcher.pid, number)
        assert_saved(run)


_STOPPED = """
import os, pkgutil, signal

place, _, name = os.environ["STOPPED_AT"].rpartition(".")
holder = pkgutil.resolve_name(place)
function = getattr(holder, name)


def stop_first(*arguments):
    if os.environ.get("RANK", "0") == os.environ["STOPPED_RANK"]:
        os.kill(os.getpid(), signal.SIGTERM)
    return function(*arguments)


setattr(holder, name, stop_first)
"""
_BUILDER = "torchtitan.training.builder"


def stop_at_start(
    folder: Path,
    *arguments: str,
    processes: int = 1,
    stopped: int = 0,
    site: str = f"{_BUILDER}.build_update",
) -> Any:
    (folder.parent / "stopping.py").write_text(_STOPPED)
    env = runs.environment() | {"STOPPED_RANK": str(stopped), "STOPPED_AT": site}
    env["PYTHONPATH"] = f"{folder.parent}:{env['PYTHONPATH']}"
    words = ["--job.custom_import=stopping", *arguments]
    return execute(runs.command(folder, *words, processes=processes), env=env)


@pytest.mark.fault("F14")
@pytest.mark.parametrize(
    ("processes", "stopped", "site"),
    [
        (1, 0, f"{_BUILDER}.build_update"),
        (2, 1, f"{_BUILDER}.build_update"),
        (1, 0, f"{_BUILDER}.build_metrics"),
    ],
)
def test_a_stop_before_the_first_step(
    processes: int, stopped: int, site: str, tmp_path: Path
) -> None:
    """All ranks end as preempted, also those that got no signal; the metrics open last."""
    done = stop_at_start(tmp_path / "run", processes=processes, stopped=stopped, site=site)
    assert done.returncode == (7 if processes == 1 else 1), done.stdout + done.stderr
    status = runs.status(tmp_path / "run")
    assert (status["status"], status["step"], status["exit_code"]) == ("preempted", 0, 7)
    assert "Asked to stop before the first step" in done.stdout + done.stderr
    assert "Traceback" not in done.stderr


@pytest.mark.fault("F14", "F48")
def test_a_stop_while_a_checkpoint_is_loaded(tmp_path: Path) -> None:
    """DCP makes an error of it on all ranks, which it is not."""
    folder, site = tmp_path / "run", "torchtitan.checkpoint.dcp_io.SafeReader.read_data"
    runs.run_killed(folder)
    done = stop_at_start(folder, processes=2, stopped=1, site=site)
    status = runs.status(folder)
    assert (status["status"], status["exit_code"]) == ("preempted", 7), done.stderr
    assert (status["step"], status["requeue"]) == (4, True)
    assert "could not be loaded" not in done.stderr


def test_a_new_run_replaces_the_old_one_when_it_begins(tmp_path: Path) -> None:
    """A start that does not come to its first step leaves the old run in its place."""
    folder, short = tmp_path / "run", ("--training.steps=2", "--lr_scheduler.warmup_steps=1")
    runs.run(folder, *short)
    old = runs.status(folder)
    assert stop_at_start(folder, *short, "--job.new_run").returncode == 7
    assert runs.status(folder) == old and not (folder / "previous-1").exists()
    runs.run(folder, *short, "--job.new_run")
    assert runs.status(folder)["run_id"] != old["run_id"]
    for place in (folder, folder / "previous-1"):
        assert len(runs.records(place)) == 2
        assert (place / "checkpoint" / "step-2").is_dir()


@pytest.mark.fault("F16")
def test_all_ranks_stop_at_the_step_in_which_one_sees_the_stop_file(tmp_path: Path) -> None:
    """One that an earlier start has left is none."""
    folder = tmp_path / "run"
    folder.mkdir()
    (folder / "stop").touch()
    with ranks_of(folder, [LONG] * 2) as ranks:
        metrics = folder / "metrics.jsonl"
        wait_until(lambda: metrics.exists() and metrics.read_text().count("\n") > 2)
        (folder / "stop").touch()
        for status, output in [rank.end() for rank in ranks]:
            assert status == 7, output
    status = runs.status(folder)
    assert (status["status"], status["requeue"]) == ("preempted", True)
    assert (folder / "checkpoint" / f"step-{status['step']}").is_dir()


_SLOW_SAVES = """
import pathlib, time
from torchtitan.checkpoint.store import CheckpointStore
from torchtitan.utils import host

host._IMPORTED, host._COMPUTED_BEFORE = time.perf_counter(), 0.0  # the process was forked
pathlib.Path(__file__).with_name("started").touch()
commit = CheckpointStore._commit


def commit_slowly(self, *arguments):
    time.sleep(1)
    commit(self, *arguments)


CheckpointStore._commit = commit_slowly
"""


@pytest.mark.fault("F16")
def test_a_run_has_saved_and_left_when_its_time_is_over(tmp_path: Path) -> None:
    """Each save takes a second; the first one shows it."""
    folder, limit = tmp_path / "run", 6.0
    (tmp_path / "slow_saves.py").write_text(_SLOW_SAVES)
    path = f"{tmp_path}:{runs.environment()['PYTHONPATH']}"
    words = runs.command(folder, *LONG, "--checkpoint.enable_first_step_checkpoint")
    words += ["--job.custom_import=slow_saves", f"--training.max_seconds={limit}"]
    done = execute(words, env=runs.environment() | {"PYTHONPATH": path})
    assert done.returncode == 7, done.stderr
    started, ended = (tmp_path / "started").stat(), (folder / "run_status.json").stat()
    assert limit / 2 < ended.st_mtime - started.st_mtime < limit
    saved = map(int, re.findall(r"Saved step (\d+) ", done.stderr))
    assert list(saved) == [1, runs.status(folder)["step"]]


def test_a_time_limit_too_short_for_a_step_is_not_tried_again(tmp_path: Path) -> None:
    runs.run(tmp_path / "run", "--training.max_seconds=0.1", expect=7)
    status = runs.status(tmp_path / "run")
    assert (status["status"], status["step"], status["requeue"]) == ("preempted", 0, False)


_STOPPED_COMPILING = """
import os, signal
from torch._dynamo.backends import registry

eager = registry.lookup_backend("eager")


def stopping(graph, inputs, **options):
    if os.environ["RANK"] == "1":
        os.kill(os.getpid(), signal.SIGTERM)
    return eager(graph, inputs, **options)


registry._COMPILER_FNS["eager"] = stopping
"""


@pytest.mark.parametrize("during", ["compilation", "generation"])
def test_a_stop_in_the_first_step_saves_it_on_all_ranks(during: str, tmp_path: Path) -> None:
    """One rank gets the signal while it compiles, or generates the text of an evaluation."""
    folder, words = tmp_path / "run", list(LONG)
    if during == "compilation":
        (tmp_path / "stopping_backend.py").write_text(_STOPPED_COMPILING)
        words += ["--job.custom_import=stopping_backend", "--model.handlers=compile"]
        words += ["--handlers.compile.backend=eager"]
        env = runs.environment()
        env["PYTHONPATH"] = f"{tmp_path}:{env['PYTHONPATH']}"
        done = execute(runs.command(folder, *words, processes=2), env=env)
    else:
        words += ["--evaluation.tasks=answers", f"--evaluation.task_dir={write_tasks(tmp_path)}"]
        words += ["--evaluation.freq=1", "--evaluation.batch_size=1"]
        site = "torchtitan.generation.generate.Generator.generate"
        done = stop_at_start(folder, *words, processes=2, stopped=1, site=site)
        assert "left the evaluation after step 1" in done.stderr, done.stderr
    status = runs.status(folder)
    assert (status["status"], status["exit_code"]) == ("preempted", 7), done.stderr
    assert status["step"] in (1, 2), status  # the next one is read ahead
    assert (folder / "checkpoint" / f"step-{status['step']}").is_dir()
    assert "Traceback" not in done.stderr
