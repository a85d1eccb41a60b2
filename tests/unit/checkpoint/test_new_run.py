"""`job.new_run`: a run that replaces the one in its folder."""

from pathlib import Path

import pytest
from folders import make_config, open_folder, refused, saved_by, snapshot, stopped_run

from torchtitan.checkpoint.run_folder import RunFolder
from torchtitan.config.load import load_config
from torchtitan.config.run_context import RunContext


@pytest.mark.parametrize("variable", ["SLURM_RESTART_COUNT", "TORCHELASTIC_RESTART_COUNT"])
def test_new_run_is_not_repeated_by_a_launcher(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch, variable: str
) -> None:
    monkeypatch.setenv(variable, "0")
    stopped_run(tmp_path, 5)
    anew = {"new_run": True}
    saved_by(open_folder(tmp_path, job=anew), 7)
    assert (tmp_path / "previous-1").exists()
    monkeypatch.setenv(variable, "1")
    decision = open_folder(tmp_path, job=anew).decision
    assert (decision.action, decision.step) == ("resume", 7)
    assert "job.new_run is ignored" in " ".join(decision.notices)
    assert not (tmp_path / "previous-2").exists()


def test_new_run_loads_nothing(tmp_path: Path) -> None:
    stopped_run(tmp_path, 5)
    text = refused(tmp_path, job={"new_run": True}, checkpoint={"load_step": 5})
    assert "checkpoint.load_step = 5: belongs to the old run" in text


def test_new_run_moves_the_old_one_aside(tmp_path: Path) -> None:
    stopped_run(tmp_path, 5)
    seen = {"tb", "metrics", "wandb", "ledger", "profile_trace", "memory_snapshot", "comm_traces"}
    for name in seen:
        (tmp_path / name).mkdir()
    (tmp_path / "notes.txt").write_text("mine")
    (tmp_path / "metrics.jsonl.damaged-1").write_text("?")
    (tmp_path / "record.jsonl").write_text("?")
    seen |= {"metrics.jsonl.damaged-1", "record.jsonl"}
    opened = open_folder(tmp_path, job={"new_run": True}, optimizer={"lr": 0.5})
    assert opened.decision.action == "new"
    old = {path.name for path in (tmp_path / "previous-1").iterdir()}
    assert old == {"config.toml", "run_status.json", "metrics.jsonl", "checkpoint"} | seen
    now = {path.name for path in tmp_path.iterdir()}
    ours = {".lock", "config.toml", "run_status.json", "checkpoint", "comm_traces"}
    assert now == {*ours, "notes.txt", "previous-1"}
    assert list((tmp_path / "checkpoint").iterdir()) == []
    # The stored config does not move the run aside when it is trained from.
    assert not load_config([str(tmp_path / "config.toml")]).config.job.new_run
    open_folder(tmp_path, job={"new_run": True})
    assert (tmp_path / "previous-2" / "run_status.json").exists()


def test_a_new_run_that_does_not_begin_leaves_the_old_one(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    """Anything may keep it from its first step: its data, memory, a signal."""
    stopped_run(tmp_path, 5)
    before = snapshot(tmp_path)
    config = make_config(tmp_path, job={"new_run": True})
    opened = RunFolder.open(config, RunContext(config, 1, "cpu"))
    assert opened.decision.replaces_run and opened.keeps_status(MemoryError())
    opened.close()
    mark = tmp_path / ".new_run"
    assert {path: text for path, text in snapshot(tmp_path).items() if path != str(mark)} == before
    # A launcher that restarts the job means the new run, which has not begun.
    monkeypatch.setenv("SLURM_RESTART_COUNT", "1")
    opened = RunFolder.open(config, RunContext(config, 1, "cpu"))
    opened.close()
    assert opened.decision.replaces_run
    assert open_folder(tmp_path).decision.action == "resume" and not mark.exists()
    assert not RunFolder.open(config, RunContext(config, 1, "cpu")).decision.replaces_run


def test_new_run_in_a_folder_without_a_run(tmp_path: Path) -> None:
    (tmp_path / "tb").mkdir()
    assert open_folder(tmp_path, job={"new_run": True}).decision.action == "new"
    assert (tmp_path / "tb").exists() and not (tmp_path / "previous-1").exists()
