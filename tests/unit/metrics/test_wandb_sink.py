"""Weights & Biases: the real package, offline; what it wrote is read back from its files."""

import builtins
import os
import signal
import subprocess
import sys
from collections.abc import Iterator
from pathlib import Path
from typing import Any

import pytest
from test_metrics import Clock, build, records, train

from tests.forked import execute
from tests.wandb_file import offline_runs
from torchtitan.config import JobConfig
from torchtitan.config.run_context import RunContext
from torchtitan.metrics import wandb_sink
from torchtitan.metrics.sinks import SinkRun
from torchtitan.metrics.wandb_sink import WandbSink
from torchtitan.preflight.outputs import check_environment
from torchtitan.utils.environment import WandbEnvironment, read_wandb

CONFIG = {
    "training": {"steps": 7, "hf_token": "plain-secret"},
    "job": {"description": "with hf_abcdefghijklmnopqrstu", "unset": None},
    "model": {"tokenizer_path": "tok", "handlers": ["compile"]},
}


@pytest.fixture(autouse=True)
def no_login(monkeypatch: pytest.MonkeyPatch, tmp_path: Path) -> Iterator[None]:
    """As on a machine where nobody has ever used wandb."""
    for name in ("WANDB_API_KEY", "WANDB_PROJECT", "WANDB_MODE", "WANDB_TEAM", "WANDB_RUN_ID"):
        monkeypatch.delenv(name, raising=False)
    monkeypatch.setenv("NETRC", str(tmp_path / "no-netrc"))
    monkeypatch.setenv("WANDB_CONFIG_DIR", str(tmp_path / "wandb-config"))
    yield
    import wandb

    wandb.teardown()


def opener(folder: Path, **arguments: Any) -> dict[str, Any]:
    environment = WandbEnvironment(**{"mode": "offline", **arguments.pop("environment", {})})
    run = SinkRun(folder, "abc123", CONFIG, arguments.pop("rank", None))
    return {"Weights & Biases": lambda: WandbSink(run, environment, **arguments)}


def test_records_arrive_under_the_tags_of_tensorboard(tmp_path: Path) -> None:
    environment = {
        "project": "mine",
        "entity": "team",
        "name": "try 1",
        "tags": ("a", "b"),
        "group": "g",
        "job_type": "j",
    }
    folder = tmp_path / "debug"
    folder.mkdir()
    sinks = opener(folder, environment=environment, description="what it is")
    metrics = build(folder, clock := Clock(), more_sinks=sinks)
    metrics.resume(0)
    train(metrics, clock, 1, 7)
    metrics.flush()
    metrics.close()

    [run] = offline_runs(folder)
    assert run.run.run_id == "abc123" and run.run.project == "mine" and run.run.entity == "team"
    assert run.run.display_name == "try 1" and list(run.run.tags) == ["a", "b"]
    assert run.run.run_group == "g" and run.run.job_type == "j" and run.run.notes == "what it is"
    assert run.exit_code == 0 and run.axis == "step"
    written = records(folder)
    assert [row["step"] for row in run.history] == [1, 3, 6, 7]
    for row, record in zip(run.history, written, strict=True):
        assert row["loss"] == record["loss"]
        assert row["time_metrics/data_loading(%)"] == 25.0
        assert row["time_share/compute(%)"] == 100 * record["time_share/compute"]
        assert "mfu(%)" not in row


def test_secrets_are_not_uploaded(tmp_path: Path) -> None:
    metrics = build(tmp_path, Clock(), more_sinks=opener(tmp_path))
    metrics.close()
    [run] = offline_runs(tmp_path)
    assert run.config["training"] == {"steps": 7, "hf_token": "<hidden>"}
    assert run.config["job"] == {"description": "with <hidden>", "unset": None}
    assert run.config["model"] == {"tokenizer_path": "tok", "handlers": ["compile"]}
    for file in (tmp_path / "wandb").rglob("*"):
        if file.is_file():
            assert b"plain-secret" not in file.read_bytes(), file
            assert b"hf_abcdefgh" not in file.read_bytes(), file


def test_a_resume_goes_on_with_the_same_run(tmp_path: Path) -> None:
    for first, last in ((1, 6), (4, 7)):  # the second start is from an earlier step
        metrics = build(tmp_path, clock := Clock(), more_sinks=opener(tmp_path), log_freq=1)
        metrics.resume(first - 1)
        train(metrics, clock, first, last)
        metrics.close(failed=last == 6)
    runs = offline_runs(tmp_path)
    assert [run.run.run_id for run in runs] == ["abc123", "abc123"]
    assert [run.exit_code for run in runs] == [1, 0]
    # Nothing is dropped although its step is smaller than one before it.
    assert [row["step"] for run in runs for row in run.history] == [*range(1, 7), *range(4, 8)]
    assert {run.run.project for run in runs} == {"torchtitan"}
    assert {run.run.display_name for run in runs} == {tmp_path.name}


def test_each_rank_has_a_run_of_a_group(tmp_path: Path) -> None:
    for rank in (0, 1):
        metrics = build(
            tmp_path,
            clock := Clock(),
            rank=rank,
            save_for_all_ranks=True,
            more_sinks=opener(tmp_path, rank=rank, environment={"name": "big"}),
        )
        train(metrics, clock, 1, 1)
        metrics.close()
    runs = {run.run.run_id: run for run in offline_runs(tmp_path)}
    assert set(runs) == {"abc123-rank0", "abc123-rank1"}
    assert {run.run.run_group for run in runs.values()} == {"big"}
    assert all(len(run.history) == 1 for run in runs.values())


@pytest.mark.parametrize("reason", ["nobody is logged in", "connection refused"])
def test_without_login_or_server_records_are_kept_for_later(
    tmp_path: Path,
    caplog: pytest.LogCaptureFixture,
    monkeypatch: pytest.MonkeyPatch,
    reason: str,
) -> None:
    if reason == "connection refused":
        monkeypatch.setenv("WANDB_API_KEY", 40 * "a")
        monkeypatch.setenv("WANDB_BASE_URL", "http://127.0.0.1:9")
        monkeypatch.setenv("WANDB__GRAPHQL_RETRY_MAX", "1")  # or wandb tries for 16 s
        monkeypatch.setattr(wandb_sink, "_INIT_TIMEOUT_SECONDS", 1.0)
    metrics = build(
        tmp_path, clock := Clock(), more_sinks=opener(tmp_path, environment={"mode": None})
    )
    train(metrics, clock, 1, 7)
    metrics.close()
    [warning] = [record.getMessage() for record in caplog.records if record.levelname == "WARNING"]
    assert "Weights & Biases cannot be reached" in warning and f"{reason})" in warning
    assert "`wandb sync`" in warning and str(tmp_path / "wandb") in warning
    [run] = offline_runs(tmp_path)
    assert len(run.history) == 4 == len(records(tmp_path))


def test_a_folder_that_wandb_cannot_have_does_not_stop_the_run(
    tmp_path: Path, caplog: pytest.LogCaptureFixture, monkeypatch: pytest.MonkeyPatch
) -> None:
    imported = builtins.__import__

    def fail(name: str, *rest: Any, **more: Any) -> Any:
        if name == "wandb":
            raise ImportError("gone since the check")
        return imported(name, *rest, **more)

    monkeypatch.setattr(builtins, "__import__", fail)
    metrics = build(tmp_path, clock := Clock(), more_sinks=opener(tmp_path))
    train(metrics, clock, 1, 7)
    metrics.close()
    monkeypatch.undo()
    assert caplog.text.count("Weights & Biases cannot be written, training continues") == 1
    assert len(records(tmp_path)) == 4


HIT = """
import logging, os, signal, sys, time
from pathlib import Path
sys.path[:0] = [{root!r}, {tests!r}]
import test_metrics as t
from test_wandb_sink import opener
from torchtitan.metrics import wandb_sink

wandb_sink._FINISH_TIMEOUT_SECONDS = wandb_sink._ANSWER_TIMEOUT_SECONDS = 1.0

def children():
    for path in Path("/proc").glob("[0-9]*/stat"):
        try:
            head, rest = path.read_text().rsplit(") ", 1)
        except OSError:
            continue
        if int(rest.split()[1]) == os.getpid():
            yield int(head.split(" (")[0])

logging.basicConfig(stream=sys.stderr, format="%(levelname)s %(message)s")
folder = Path({folder!r})
clock = t.Clock()
metrics = t.build(folder, clock, steps={steps}, log_freq=1, more_sinks=opener(folder))
t.train(metrics, clock, 1, 2)
services = list(children())
assert services
for pid in services:
    os.kill(pid, signal.{signal})
time.sleep(0.1)
t.train(metrics, clock, 3, {steps})
metrics.flush()
metrics.close()
print("still here")
"""


def run_while_wandb_is_hit(folder: Path, name: str, steps: int) -> str:
    """What a process logs whose wandb gets the signal `name` after 2 of its `steps`."""
    here = Path(__file__)
    places = {"root": str(here.parents[3]), "tests": str(here.parent), "folder": str(folder)}
    code = HIT.format(**places, signal=name, steps=steps)
    done = execute([sys.executable, "-c", code], os.environ)
    assert done.returncode == 0, done.stderr
    assert done.stdout.splitlines()[-1] == "still here"
    assert len(records(folder)) == steps
    return done.stderr


def test_wandb_that_dies_in_the_middle_does_not_stop_the_run(tmp_path: Path) -> None:
    errors = run_while_wandb_is_hit(tmp_path, "SIGKILL", 40)
    assert errors.count("Weights & Biases cannot be written, training continues") <= 1


@pytest.mark.parametrize("steps", [40, 1500], ids=["at the end", "when it takes no more"])
def test_wandb_that_hangs_does_not_stop_the_run(tmp_path: Path, steps: int) -> None:
    errors = run_while_wandb_is_hit(tmp_path, "SIGSTOP", steps)
    assert errors.count("Weights & Biases did not answer") == 1
    assert errors.count("Weights & Biases cannot be written, training continues") == 1


def test_a_child_that_has_ended_does_not_keep_wandb_s_alive(
    monkeypatch: pytest.MonkeyPatch,
) -> None:
    read_text = Path.read_text

    def with_ended_child(path: Path, *rest: Any) -> str:
        ended = f"{2**22 + 1} " if path.name == "children" else ""  # more than Linux ever gives
        return ended + read_text(path, *rest)

    code = "open('/proc/self/comm', 'w').write('wandb-core'); print(flush=True); input()"
    words = [sys.executable, "-S", "-c", code]
    with subprocess.Popen(words, stdin=subprocess.PIPE, stdout=subprocess.PIPE) as child:
        assert child.stdout and child.stdout.readline()
        monkeypatch.setattr(Path, "read_text", with_ended_child)
        wandb_sink._kill_service(1.0)
        assert child.wait(10) == -signal.SIGKILL


def test_a_process_of_wandb_s_that_fails_does_not_end_this_one(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    """wandb would end Python with the status of its process."""
    import wandb

    metrics = build(tmp_path, clock := Clock(), more_sinks=opener(tmp_path))
    train(metrics, clock, 1, 7)
    torn_down = []

    def fail() -> None:
        torn_down.append(True)
        sys.exit(3)

    with monkeypatch.context() as patched:
        patched.setattr(wandb, "teardown", fail)
        metrics.close()
    assert torn_down == [True]


def problems(monkeypatch: pytest.MonkeyPatch, **variables: str) -> list[str]:
    for name, value in variables.items():
        monkeypatch.setenv(name, value)
    config = JobConfig(metrics={"enable_wandb": True})
    return [
        str(problem)
        for problem in check_environment(RunContext(config, world_size=1, device_type="cpu"))
    ]


def test_checks(monkeypatch: pytest.MonkeyPatch, tmp_path: Path) -> None:
    monkeypatch.chdir(tmp_path)
    assert problems(monkeypatch, WANDB_MODE="offline", WANDB_PROJECT="llama-3 runs") == []
    [problem] = problems(monkeypatch, WANDB_MODE="of")
    assert "offline" in problem and problem.startswith('WANDB_MODE = "of"')
    [problem] = problems(monkeypatch, WANDB_MODE="online", WANDB_PROJECT="me/mine")
    assert problem.startswith('WANDB_PROJECT = "me/mine"')


def test_the_missing_package_is_named(monkeypatch: pytest.MonkeyPatch) -> None:
    from importlib import util

    find = util.find_spec
    monkeypatch.setattr(util, "find_spec", lambda name: None if name == "wandb" else find(name))
    [problem] = problems(monkeypatch)
    assert "`pip install wandb`" in problem and problem.startswith("metrics.enable_wandb = true")


def test_variables_by_both_names() -> None:
    assert read_wandb({}) == WandbEnvironment()
    theirs = {"WANDB_TEAM": "t", "WANDB_RUN_NAME": "n", "WANDB_RUN_TAGS": "a, b,", "WANDB_MODE": ""}
    assert read_wandb(theirs) == WandbEnvironment(entity="t", name="n", tags=("a", "b"))
    wandbs = {"WANDB_ENTITY": "t", "WANDB_NAME": "n", "WANDB_TAGS": "a", "WANDB_NOTES": "x"}
    assert read_wandb(wandbs) == WandbEnvironment(entity="t", name="n", tags=("a",), notes="x")
    assert read_wandb({**wandbs, **theirs}).tags == ("a", "b")
