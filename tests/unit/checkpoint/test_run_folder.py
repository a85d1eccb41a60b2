"""What a start in a folder does, in folders as real runs leave them."""

import json
import os
import shutil
from pathlib import Path
from unittest import mock

import pytest
from folders import (
    finished_run,
    make_config,
    open_folder,
    plant_step,
    refused,
    saved_by,
    snapshot,
    stopped_run,
)

from torchtitan.checkpoint.run_folder import RunFolder, Status
from torchtitan.config import CheckpointError, ConfigError, ConfigIssue, JobConfig
from torchtitan.config.load import load_config
from torchtitan.config.run_context import RunContext
from torchtitan.training import run
from torchtitan.utils.environment import ProcessEnvironment
from torchtitan.utils.processes import StopRequest, StopRequested


def test_new_folder(tmp_path: Path) -> None:
    folder = tmp_path / "a" / "run"
    opened = open_folder(folder, world_size=2)
    assert opened.decision.action == "new"
    assert (opened.decision.global_batch_size, opened.decision.num_lanes) == (8, 8)
    status = json.loads((folder / "run_status.json").read_text())
    assert (status["status"], status["step"], status["exit_code"]) == ("running", 0, None)
    assert status["run_id"] == opened.decision.run_id
    reloaded = load_config([str(folder / "config.toml")]).config
    assert reloaded.training.global_batch_size == 8
    assert reloaded.model_copy(update={"job": opened.config.job}) == opened.config
    assert opened.checkpoint_folder == folder / "checkpoint"


def test_same_command_goes_on(tmp_path: Path) -> None:
    run_id = stopped_run(tmp_path, 5, 10)
    decision = open_folder(tmp_path).decision
    assert (decision.action, decision.run_id, decision.step) == ("resume", run_id, 10)
    assert decision.notices == ()


def test_a_checkpoint_of_a_release_with_another_learning_rate_is_noticed(tmp_path: Path) -> None:
    run_id = stopped_run(tmp_path)
    plant_step(tmp_path, 5, run_id, state={"step": 5})
    (notice,) = open_folder(tmp_path).decision.notices
    assert "of an earlier release, whose learning rate never reached its peak" in notice
    plant_step(tmp_path, 6, run_id, state={"step": 6, "handlers": {}})
    assert open_folder(tmp_path).decision.notices == ()


def test_other_mesh_goes_on_with_the_same_batch(tmp_path: Path) -> None:
    stopped_run(tmp_path, 5)
    opened = open_folder(tmp_path, world_size=4, training={"local_batch_size": 2})
    assert opened.decision.action == "resume"
    assert opened.config.training.global_batch_size == 4
    assert opened.config.data.lanes == 4
    notice = " ".join(opened.decision.notices)
    assert "training.global_batch_size stays 4" in notice and "would be 8" in notice


def test_resolved_values_survive_reruns(tmp_path: Path) -> None:
    stopped_run(tmp_path, 5)
    for world_size in (2, 4, 1):
        assert open_folder(tmp_path, world_size).config.training.global_batch_size == 4


def test_other_config_is_refused(tmp_path: Path) -> None:
    stopped_run(tmp_path, 5)
    text = refused(tmp_path, optimizer={"lr": 0.5}, model={"args": {"n_layers": 3}})
    assert "optimizer.lr = 0.5: is 0.0008 in the run" in text
    assert "model.args.n_layers = 3: is unset in the run" in text
    assert "--job.dump_folder" in text and "--job.new_run" in text
    assert "training.global_batch_size = 16: is 4" in refused(
        tmp_path, training={"global_batch_size": 16}
    )
    assert "training.steps = 10: is 20" in refused(tmp_path, training={"steps": 10})
    assert "checkpoint.folder" in refused(tmp_path, checkpoint={"folder": "other"})


def test_run_that_never_trained_may_be_mended(tmp_path: Path) -> None:
    """It died before it had done anything; its config may have been the reason."""
    run_id = open_folder(tmp_path).decision.run_id
    decision = open_folder(tmp_path, optimizer={"lr": 0.5}).decision
    assert (decision.action, decision.run_id) == ("new", run_id)
    assert "lr = 0.5" in (tmp_path / "config.toml").read_text()


def test_run_without_checkpoint_starts_again(tmp_path: Path) -> None:
    run_id = stopped_run(tmp_path)
    decision = open_folder(tmp_path).decision
    assert (decision.action, decision.run_id, decision.step) == ("resume", run_id, 0)
    assert "starts again from step 0" in decision.notices[0]
    refused(tmp_path, optimizer={"lr": 0.5})


def test_checkpoints_are_not_forgotten(tmp_path: Path) -> None:
    stopped_run(tmp_path, 5)
    text = refused(tmp_path, checkpoint={"enable": False})
    assert "checkpoint.enable = false: would start from step 0 again" in text


def test_finished(tmp_path: Path) -> None:
    finished_run(tmp_path, 10, 20)
    before = snapshot(tmp_path)
    opened = open_folder(tmp_path, world_size=2)
    assert opened.decision.action == "finished"
    assert "has trained 20 steps" in opened.decision.notices[0]
    opened.set_status("failed", 0, 1)
    assert snapshot(tmp_path) == before
    assert "training.seq_len" in refused(tmp_path, training={"seq_len": 64})


@pytest.mark.fault("F02", "F54")
@pytest.mark.parametrize("status", ["running", "failed"])
def test_killed_between_last_checkpoint_and_status(tmp_path: Path, status: Status) -> None:
    """Or while it deleted an older step: the next start says how it ended, and tidies up."""
    opened = open_folder(tmp_path)
    opened.begin()
    run_id = opened.decision.run_id
    plant_step(tmp_path, 20, run_id, state={"finished": True})
    trash = tmp_path / "checkpoint" / f".trash-{run_id}-step-10-0a"
    trash.mkdir()
    opened.set_status(status, 20, None if status == "running" else 1, requeue=True)
    assert open_folder(tmp_path).decision.action == "finished"
    stored = json.loads((tmp_path / "run_status.json").read_text())
    assert (stored["status"], stored["step"], stored["exit_code"]) == ("completed", 20, 0)
    assert not stored["requeue"] and not trash.exists()


def test_failed_at_the_last_step_is_not_finished(tmp_path: Path) -> None:
    """Its last checkpoint could not be written."""
    finished_run(tmp_path, 10, status="failed", step=20)
    decision = open_folder(tmp_path).decision
    assert (decision.action, decision.step) == ("resume", 10)


def test_end_of_data_is_an_end(tmp_path: Path) -> None:
    finished_run(tmp_path, 13, status="data_exhausted", step=13)
    assert open_folder(tmp_path).decision.action == "finished"
    assert open_folder(tmp_path, training={"steps": 40}).decision.action == "finished"


def test_end_of_data_is_known_before_the_status_is_written(tmp_path: Path) -> None:
    """Killed after the last checkpoint: that one says that the run is over."""
    run_id = stopped_run(tmp_path, 10)
    plant_step(tmp_path, 13, run_id, model_only=True, state={"finished": True})
    decision = open_folder(tmp_path).decision
    assert (decision.action, decision.step) == ("finished", 13)
    assert "its data ended at step 13" in decision.notices[0]
    assert open_folder(tmp_path, training={"steps": 40}).decision.action == "finished"


def test_last_checkpoint_of_all_steps_is_not_an_end_of_data(tmp_path: Path) -> None:
    opened = open_folder(tmp_path)
    info = {key: value for key, value in opened.run_info().items() if key != "run_id"}
    plant_step(tmp_path, 20, opened.decision.run_id, state={"finished": True}, info=info)
    assert open_folder(tmp_path, training={"steps": 30}).decision.action == "resume"
    # Also after the larger number was stored.
    assert open_folder(tmp_path, training={"steps": 30}).decision.action == "resume"
    assert open_folder(tmp_path, training={"steps": 30}).decision.step == 20


def test_status_of_a_running_run(tmp_path: Path) -> None:
    opened = open_folder(tmp_path)
    before = json.loads((tmp_path / "run_status.json").read_text())
    opened.set_status("running", 7)
    status = json.loads((tmp_path / "run_status.json").read_text())
    assert status == before | {"step": 7, "time": status["time"]}
    plant_step(tmp_path, 5, before["run_id"])
    assert open_folder(tmp_path).decision.step == 5  # what is not saved is lost with the process


@pytest.mark.fault("F33")
def test_steps_may_grow(tmp_path: Path) -> None:
    finished_run(tmp_path, 10, 20)
    opened = open_folder(tmp_path, training={"steps": 30})
    assert (opened.decision.action, opened.decision.step) == ("resume", 20)
    assert "training.steps grows from 20 to 30" in opened.decision.notices[0]
    assert json.loads((tmp_path / "run_status.json").read_text())["status"] == "running"


def test_epochs_may_grow(tmp_path: Path) -> None:
    one, two = {"epochs": 1}, {"epochs": 2}
    run_id = stopped_run(tmp_path, 5, data=one)
    assert open_folder(tmp_path, data=two).decision.action == "resume"
    opened = open_folder(tmp_path, data=two)
    saved_by(opened, 13)
    opened.set_status("data_exhausted", 13, 0)
    assert open_folder(tmp_path, data=two).decision.action == "finished"
    assert "data.epochs = 1: is 2 in the run" in refused(tmp_path, data=one)
    for epochs in (3, None):  # the second start was killed before it had saved anything
        decision = open_folder(tmp_path, data={"epochs": epochs}).decision
        assert (decision.action, decision.step, decision.run_id) == ("resume", 13, run_id)
        assert f"data.epochs grows from {2 if epochs else 3} to" in decision.notices[0]
    assert open_folder(tmp_path, data={"epochs": None}).decision.action == "resume"


def test_epochs_cannot_grow_from_nothing(tmp_path: Path) -> None:
    opened = open_folder(tmp_path, data={"epochs": 1})
    opened.set_status("data_exhausted", 13, 0)
    text = refused(tmp_path, data={"epochs": 2})
    assert "data.epochs = 2: the run finished at step 13 and left no checkpoint" in text


def test_an_unset_warmup_stays_that_of_the_first_start(tmp_path: Path) -> None:
    """12 of 60 steps; 200 from step 11 on would go back to the beginning of the warmup."""
    stopped_run(tmp_path, 5, 10, training={"steps": 60})
    opened = open_folder(tmp_path, training={"steps": 600})
    assert opened.config.lr_scheduler.warmup_steps == 12
    assert "lr_scheduler.warmup_steps stays 12" in " ".join(opened.decision.notices)
    assert "warmup_steps = 50: is 12" in refused(
        tmp_path, training={"steps": 600}, lr_scheduler={"warmup_steps": 50}
    )


@pytest.mark.fault("F33")
def test_steps_cannot_grow_from_a_model_alone(tmp_path: Path) -> None:
    finished_run(tmp_path, 20, model_only=True)
    assert open_folder(tmp_path).decision.action == "finished"
    text = refused(tmp_path, training={"steps": 30})
    assert "training.steps = 30: the checkpoint of step 20 has no optimizer state" in text


def test_steps_cannot_grow_from_nothing(tmp_path: Path) -> None:
    finished_run(tmp_path)
    assert "left no checkpoint to continue from" in refused(tmp_path, training={"steps": 30})


def test_going_back(tmp_path: Path) -> None:
    finished_run(tmp_path, 10, 20)
    text = refused(tmp_path, checkpoint={"load_step": 10})
    assert "checkpoint.load_step = 10: is older than steps 20" in text
    decision = open_folder(tmp_path, checkpoint={"load_step": 10, "allow_rewind": True}).decision
    assert (decision.action, decision.notices[-1]) == (
        "resume",
        "Going back from step 20 to step 10.",
    )


def test_going_back_is_done_once(tmp_path: Path) -> None:
    """A scheduler repeats the whole command."""
    back = {"load_step": 10, "allow_rewind": True}
    finished_run(tmp_path, 10, 15)
    first = open_folder(tmp_path, checkpoint=back)
    assert (first.config.checkpoint.load_step, first.decision.step) == (10, 10)
    # Killed before it had saved anything: still to be done.
    assert open_folder(tmp_path, checkpoint=back).config.checkpoint.load_step == 10
    os.rename(tmp_path / "checkpoint" / "step-15", tmp_path / "checkpoint" / "rewound-step-15-a")
    saved_by(first, 12, 14)
    for start in range(2):  # the start that goes on says so in what it saves, too
        again = open_folder(tmp_path, checkpoint=back)
        assert (again.config.checkpoint.load_step, again.decision.step) == (-1, 14 + 2 * start)
        assert "has been followed already" in again.decision.notices[0]
        saved_by(again, 16 + 2 * start)
    saved_by(again, 20)
    assert open_folder(tmp_path, checkpoint=back).decision.action == "finished"
    other = {"load_step": 12, "allow_rewind": True}
    assert open_folder(tmp_path, checkpoint=other).config.checkpoint.load_step == 12


def test_load_step_that_was_the_newest_is_not_in_the_way_of_a_rerun(tmp_path: Path) -> None:
    stopped_run(tmp_path, 5, 10)
    saved_by(open_folder(tmp_path, checkpoint={"load_step": 10}), 15)
    decision = open_folder(tmp_path, checkpoint={"load_step": 10}).decision
    assert (decision.action, decision.step, decision.load_step) == ("resume", 15, -1)
    # A later start without it is the end of that.
    saved_by(open_folder(tmp_path), 18)
    assert "older than steps 15, 18" in refused(tmp_path, checkpoint={"load_step": 10})


@pytest.mark.parametrize("new_run", [False, True])
def test_resolved_config_can_be_refused(tmp_path: Path, new_run: bool) -> None:
    """Before anything is written: 3 processes cannot share the 4 sequences taken over."""
    stopped_run(tmp_path, 5)
    before = snapshot(tmp_path)
    config = make_config(tmp_path, job={"new_run": new_run})
    seen = []

    def check(resolved: JobConfig) -> None:
        seen.append(resolved.training.global_batch_size)
        raise ConfigError(ConfigIssue("training.global_batch_size", "cannot be shared", "choose 4"))

    with pytest.raises(ConfigError, match="cannot be shared"):
        RunFolder.open(config, RunContext(config, 3, "cpu"), check=check)
    assert seen == [12 if new_run else 4]
    assert snapshot(tmp_path) == before
    assert open_folder(tmp_path).decision.action == "resume"  # nor is the lock kept


@pytest.mark.parametrize("status", ["completed", "preempted"])
def test_start_that_does_not_come_to_its_first_step_changes_nothing(
    tmp_path: Path, status: str
) -> None:
    """What it would be compared with stays what it was, so the first command still holds."""
    finished_run(tmp_path, 20, status=status)
    before = snapshot(tmp_path)
    config = make_config(tmp_path, training={"steps": 40})
    opened = RunFolder.open(config, RunContext(config, 1, "cpu"))
    assert opened.decision.action == "resume"
    assert opened.keeps_status(CheckpointError("other data"))
    # A crash is told to a scheduler, unless it would hide that the run is complete.
    assert opened.keeps_status(MemoryError()) == (status == "completed")
    opened.close()
    assert snapshot(tmp_path) == before
    opened.begin()
    assert not opened.keeps_status(CheckpointError("disk full"))


def test_finished_run_is_not_checked(tmp_path: Path) -> None:
    """There is nothing to train on this mesh."""
    finished_run(tmp_path, 20)
    config = make_config(tmp_path)
    opened = RunFolder.open(config, RunContext(config, 3, "cpu"), check=lambda _: pytest.fail())
    opened.close()
    assert opened.decision.action == "finished"


def test_somebodys_own_config_toml_is_not_overwritten(tmp_path: Path) -> None:
    (tmp_path / "config.toml").write_text("[training]\nsteps = 3\n")
    assert "that no run has written" in refused(tmp_path)


def test_lost_files(tmp_path: Path) -> None:
    """The manifests know what run it is."""
    run_id = stopped_run(tmp_path, 5)
    (tmp_path / "run_status.json").unlink()
    assert open_folder(tmp_path).decision.run_id == run_id
    (tmp_path / "config.toml").unlink()
    assert "cannot be read" in refused(tmp_path)


def test_files_that_a_crash_emptied(tmp_path: Path) -> None:
    """An empty config.toml is no config of defaults, and an empty status is still a run's."""
    lr = {"optimizer": {"lr": 0.5}}
    saved_by(open_folder(tmp_path, **lr), 5)
    (tmp_path / "config.toml").write_text("")
    assert open_folder(tmp_path, **lr).decision.step == 5
    shutil.rmtree(tmp_path / "checkpoint")
    (tmp_path / "metrics.jsonl").write_text("{}\n")
    (tmp_path / "run_status.json").write_text("")
    assert "optimizer.lr = 0.1: is 0.5 in the run" in refused(tmp_path, optimizer={"lr": 0.1})
    assert open_folder(tmp_path, **lr).decision.action == "resume"


def test_step_of_another_run(tmp_path: Path) -> None:
    stopped_run(tmp_path, 5)
    plant_step(tmp_path, 7, "stranger")
    assert "holds step 7 of another run, stranger" in refused(tmp_path)


def test_unusable_folder(tmp_path: Path) -> None:
    (tmp_path / "file").write_text("")
    with pytest.raises(ConfigError, match=r"job\.dump_folder = .*cannot be used"):
        open_folder(tmp_path / "file" / "run")


def test_manifest_info(tmp_path: Path) -> None:
    info = open_folder(tmp_path).run_info(mesh={"dp": 1})
    assert json.loads(json.dumps(info)) == info
    assert info["config"]["training"]["global_batch_size"] == 4
    assert info["versions"]["torch"][0].isdigit() and info["mesh"] == {"dp": 1}


def test_a_stop_before_the_ranks_meet_keeps_the_step(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    stopped_run(tmp_path, 5)
    config = make_config(tmp_path, comm={"trace_buf_size": 0})
    context = RunContext(config, 1, "cpu")
    monkeypatch.setattr(run, "set_up_process_of", lambda *_: context)
    monkeypatch.setattr(run, "open_context", mock.Mock(side_effect=StopRequested))
    checks = (lambda context: None, lambda context, resolved: None)
    assert run.run(config, ProcessEnvironment(), *checks, StopRequest()) == 7
    status = json.loads((tmp_path / "run_status.json").read_text())
    assert (status["status"], status["step"], status["exit_code"]) == ("preempted", 5, 7)
