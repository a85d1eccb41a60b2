"""Faults of whole runs, and what their folders say afterwards."""

import os
import signal
from pathlib import Path

import pytest

from tests.distributed import runs
from tests.distributed.test_lost_ranks import ranks_of, wait_until
from tests.distributed.test_process_life import LONG
from tests.forked import launcher_variables
from torchtitan.checkpoint.steps_folder import inspect_steps

PATIENCE = 200
"""Seconds, for a busy machine."""
SLOW_COMMITS = """
import os, pathlib, time
from torchtitan.checkpoint.store import CheckpointStore

commit, saving = CheckpointStore._commit, pathlib.Path(__file__).with_name("saving")


def commit_slowly(self, temporary, manifest):
    if manifest.step > int(os.environ.get("FAST_STEPS", 2)):
        saving.touch()
        time.sleep(float(os.environ.get("SLOW_SECONDS", 3600)))
    commit(self, temporary, manifest)


CheckpointStore._commit = commit_slowly
"""
LEAVES = """
import os
from torchtitan.utils.garbage import GarbageCollection

end_step = GarbageCollection.step


def leave(self, step):
    end_step(self, step)
    if step == 2 and os.environ["RANK"] == "1":
        os._exit(int(os.environ["CODE"]))


GarbageCollection.step = leave
"""
FAILS = """
import os
from torchtitan.training import builder, run

module = builder if hasattr(builder, os.environ["SITE"]) else run
build = getattr(module, os.environ["SITE"])


def fail(*arguments):
    if os.environ["RANK"] == "1":
        raise RuntimeError("a part of rank 1 is missing")
    return build(*arguments)


setattr(module, os.environ["SITE"], fail)
"""
FAILING_DCP = """
import torch.distributed.checkpoint as dcp
from torch.distributed.checkpoint.api import CheckpointException


def save(*arguments, **named):
    raise CheckpointException("write", {0: (RuntimeError("no answer"), None)})


dcp.save = save
"""


def good_steps(folder: Path) -> list[int]:
    return [c.step for c in inspect_steps(folder / "checkpoint") if c.manifest]


def with_code(folder: Path, code: str, *arguments: str) -> list[str]:
    """The arguments of a run whose ranks import `code`; `environment` has the path."""
    (folder.parent / "injected.py").write_text(code)
    return ["--job.custom_import=injected", *arguments]


def environment(folder: Path, **env: str) -> dict[str, str]:
    """Variables of ranks that may import what lies beside the run's folder."""
    return {"PYTHONPATH": f"{folder.parent}:{runs.environment()['PYTHONPATH']}"} | env


@pytest.mark.fault("F17")
def test_a_save_longer_than_the_grace(tmp_path: Path) -> None:
    """Killed in the middle of it, the run has the step before, and nobody says it was preempted."""
    folder = tmp_path / "run"
    words = with_code(folder, SLOW_COMMITS, "--checkpoint.interval=2")
    variables = [place | environment(folder) for place in launcher_variables(2)]
    with ranks_of(folder, [words] * 2, variables) as ranks:
        wait_until((tmp_path / "saving").exists, PATIENCE)
        for number in (signal.SIGTERM, signal.SIGKILL):
            assert runs.status(folder)["status"] == "running"
            for rank in ranks:
                os.kill(rank.process.pid, number)
        assert [rank.end(PATIENCE)[0] for rank in ranks] == [-signal.SIGKILL] * 2
    assert good_steps(folder) == [2]
    status = runs.status(folder)
    assert (status["status"], status["step"], status["exit_code"]) == ("running", 2, None)
    assert "Resumed from step 2" in runs.run(folder).stderr


@pytest.mark.fault("F45")
@pytest.mark.parametrize("code", ["0", "13"])
def test_a_rank_that_leaves_early(code: str, tmp_path: Path) -> None:
    """The other one fails and names it, whatever its exit status was."""
    folder = tmp_path / "run"
    words = with_code(folder, LEAVES, *LONG)
    variables = [place | environment(folder, CODE=code) for place in launcher_variables(2)]
    with ranks_of(folder, [words] * 2, variables) as ranks:
        status, output = ranks[0].end(PATIENCE)
        assert ranks[1].end(PATIENCE)[0] == int(code)
    assert status == 1, output
    assert "Rank 1 " in output.splitlines()[-1], output
    assert runs.status(folder)["status"] == "failed"


@pytest.mark.fault("F46")
@pytest.mark.parametrize("site", ["build_tokenizer", "build_update"])
def test_an_error_on_one_rank_before_the_first_step(site: str, tmp_path: Path) -> None:
    """All end, without waiting for the minutes that a start may take, with the same message."""
    folder = tmp_path / "run"
    words = with_code(folder, FAILS)
    variables = [place | environment(folder, SITE=site) for place in launcher_variables(2)]
    with ranks_of(folder, [words] * 2, variables) as ranks:
        for status, output in [rank.end(PATIENCE) for rank in ranks]:
            assert status == 1, output
            assert "RuntimeError: a part of rank 1 is missing" in output
    first = (tmp_path / "rank-0").read_text()
    assert "Rank 1 failed first" in first.splitlines()[-1], first
    assert not (folder / "metrics.jsonl").exists()


@pytest.mark.fault("F48")
@pytest.mark.parametrize("mode", ["disabled", "async"])
def test_an_exception_of_dcp_is_reported(mode: str, tmp_path: Path) -> None:
    """It is a BaseException, which would end a thread, or pass all handlers of exceptions."""
    folder = tmp_path / "run"
    words = with_code(folder, FAILING_DCP, f"--checkpoint.async_mode={mode}")
    with ranks_of(folder, [words], [environment(folder)]) as (rank,):
        status, output = rank.end(PATIENCE)
    assert status == 4, output
    assert "the checkpoint of step 4 was not saved: rank 0: RuntimeError: no answer" in output
    assert "Traceback" not in output
    assert runs.status(folder)["exit_code"] == 4
    assert [path.name for path in (folder / "checkpoint").iterdir()] == []


@pytest.mark.fault("F50")
def test_a_second_job_in_the_folder_is_refused(tmp_path: Path) -> None:
    """Also with --job.new_run. The first one trains on, and stops as if there had been no other."""
    folder = tmp_path / "run"
    with ranks_of(folder, [("--training.steps=100000",)]) as (rank,):
        wait_until(lambda: folder.exists() and good_steps(folder), PATIENCE)
        for more in ((), ("--job.new_run",)):
            done = runs.run(folder, "--training.steps=100000", *more, expect=2)
            assert f"process {rank.process.pid}, run " in done.stderr
        seen = len(runs.records(folder))
        wait_until(lambda: len(runs.records(folder)) > seen, PATIENCE)
        os.kill(rank.process.pid, signal.SIGTERM)
        status, output = rank.end(PATIENCE)
    assert status == 7, output
    stored = runs.status(folder)
    assert stored["status"] == "preempted" and stored["step"] in good_steps(folder)
    steps = [row["step"] for row in runs.records(folder)]
    assert steps == list(range(1, stored["step"] + 1))


@pytest.mark.fault("F33")
def test_more_steps_after_the_last_one(tmp_path: Path) -> None:
    """With a constant rate they are, bit by bit, those of a run that had them from the start."""
    constant = "--lr_scheduler.decay_ratio=0"
    runs.run(tmp_path / "whole", constant, "--training.steps=9")
    runs.run(tmp_path / "run", constant, "--training.steps=6")
    done = runs.run(tmp_path / "run", constant, "--training.steps=9")
    assert "Resumed from step 6" in done.stderr
    assert runs.curve(tmp_path / "run") == runs.curve(tmp_path / "whole")


@pytest.mark.fault("F07")
def test_data_that_end_while_a_save_is_under_way(tmp_path: Path) -> None:
    """It is waited for, and the last step saved."""
    (tmp_path / "rows.jsonl").write_text('{"text": "a line of some length"}\n' * 20)
    folder = tmp_path / "run"
    data = ("--training.dataset=json", f"--training.dataset_path={tmp_path / 'rows.jsonl'}")
    words = with_code(folder, SLOW_COMMITS, *data, "--data.lanes=2", "--data.epochs=1")
    words += ["--checkpoint.async_mode=async", "--checkpoint.interval=1", *LONG[:1]]
    words += ["--checkpoint.keep_latest_k=0", "--training.global_batch_size=2"]
    env = environment(folder, FAST_STEPS="0", SLOW_SECONDS="0.2")
    with ranks_of(folder, [words], [env]) as (rank,):
        status, output = rank.end(PATIENCE)
    assert status == 0, output
    stored = runs.status(folder)
    assert stored["status"] == "data_exhausted"
    assert good_steps(folder) == list(range(1, stored["step"] + 1))


@pytest.mark.fault("F57")
def test_a_checkpoint_names_no_code_and_keeps_no_secret(tmp_path: Path) -> None:
    """A resume imports what its own command line names; a token of the environment stays there."""
    folder, canary, token = tmp_path / "run", tmp_path / "imported", "hf_" + "q7" * 17
    words = with_code(folder, f"open({str(canary)!r}, 'w')", "--training.steps=4")
    with ranks_of(folder, [words], [environment(folder, HF_TOKEN=token)]) as (rank,):
        status, output = rank.end(PATIENCE)
    assert status == 0 and canary.exists(), output
    assert "injected" in (folder / "config.toml").read_text()
    canary.unlink()
    runs.run(folder)
    assert not canary.exists()
    contents = [path.read_bytes() for path in folder.rglob("*") if path.is_file()]
    assert token not in output and not [text for text in contents if token.encode() in text]
