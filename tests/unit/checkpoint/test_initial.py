"""What a new run may start from: seeds, other runs' checkpoints, weights of other programs."""

import json
from dataclasses import replace
from pathlib import Path
from typing import Any

import pytest
from folders import make_config, open_folder, plant_step, refused, stopped_run

from torchtitan.checkpoint.initial import without_excluded
from torchtitan.checkpoint.run_folder import RunFolder
from torchtitan.config.run_context import RunContext
from torchtitan.preflight.checkpoint import check_environment, check_static


def problems(folder: Path, world_size: int = 1, **sections: Any) -> str:
    """What arithmetic on the settings finds."""
    found = check_static(RunContext(make_config(folder, **sections), world_size, "cpu"))
    return "\n".join(str(problem) for problem in found)


def full(path: Path, *excluded: str) -> dict[str, Any]:
    """Settings that take over everything but `excluded`."""
    return {
        "initial_load_path": str(path),
        "initial_load_model_only": False,
        "exclude_from_loading": list(excluded),
    }


def other_run(folder: Path, step: int = 8, lanes: int = 8, **config: Any) -> Path:
    """Another run's checkpoint, as far as manifest and names tell."""
    state = {"step": step, "num_tokens_seen": 99, "lane_states": {str(n): {} for n in range(lanes)}}
    info = {"config": {"training": {"global_batch_size": 16}, **config}}
    plant_step(folder, step, "other", state=state, info=info)
    return folder / "checkpoint" / f"step-{step}"


# --- seeds ----------------------------------------------------------------------------------------


def write_seed(folder: Path, **sections: Any) -> str:
    """What a job with `create_seed_checkpoint` leaves, as far as names and manifest tell."""
    sections = {"checkpoint": {"create_seed_checkpoint": True}, **sections}
    opened = open_folder(folder, **sections)
    assert opened.decision.action == "new"
    run_id = opened.decision.run_id
    plant_step(folder, 0, run_id, model_only=True, state={"step": 0, "lane_states": None})
    opened.set_status("seeded", 0, 0)
    return run_id


def test_run_starts_from_a_seed_on_any_mesh(tmp_path: Path) -> None:
    run_id = write_seed(tmp_path, training={"steps": 1})
    opened = open_folder(tmp_path, world_size=4, optimizer={"lr": 0.5}, training={"steps": 30})
    decision = opened.decision
    assert (decision.action, decision.run_id, decision.step) == ("resume", run_id, 0)
    # Not those of the one process that wrote the seed.
    assert (decision.global_batch_size, decision.num_lanes) == (16, 16)
    assert decision.notices == ("The run starts from the seed checkpoint.",)
    # From now on the folder is this run's, also when it dies before its first checkpoint.
    (tmp_path / "metrics.jsonl").write_text("{}\n")
    again = open_folder(tmp_path, world_size=2, optimizer={"lr": 0.5}, training={"steps": 30})
    assert (again.decision.action, again.decision.global_batch_size) == ("resume", 16)
    assert "optimizer.lr" in refused(tmp_path, world_size=4, training={"steps": 30})


def test_seed_of_another_model_is_refused(tmp_path: Path) -> None:
    write_seed(tmp_path)
    assert "model.flavor" in refused(tmp_path, model={"flavor": "8B"})
    assert "checkpoint.folder" in refused(tmp_path, checkpoint={"folder": "elsewhere"})


def test_seed_is_written_once(tmp_path: Path) -> None:
    write_seed(tmp_path)
    again = open_folder(tmp_path, checkpoint={"create_seed_checkpoint": True})
    assert (again.decision.action, again.decision.notices) == (
        "finished",
        ("The seed checkpoint already exists.",),
    )
    assert json.loads((tmp_path / "run_status.json").read_text())["status"] == "seeded"
    other = {"checkpoint": {"create_seed_checkpoint": True}, "model": {"flavor": "8B"}}
    assert "model.flavor" in refused(tmp_path, **other)


def test_seed_is_not_written_into_a_run(tmp_path: Path) -> None:
    stopped_run(tmp_path, 5)
    message = refused(tmp_path, checkpoint={"create_seed_checkpoint": True})
    assert "that is at step 5" in message


@pytest.mark.parametrize(
    ("section", "world_size", "text"),
    [
        ({}, 2, "needs a single process, and there are 2"),
        ({"load_only": True}, 1, "contradicts checkpoint.load_only"),
        ({"initial_load_path": "/x"}, 1, "contradicts checkpoint.initial_load_path"),
        ({"enable": False}, 1, "checkpoint.enable is false"),
    ],
)
def test_bad_seed_settings(tmp_path: Path, section: Any, world_size: int, text: str) -> None:
    message = problems(tmp_path, world_size, checkpoint={"create_seed_checkpoint": True, **section})
    assert "checkpoint.create_seed_checkpoint" in message and text in message


# --- starting from another checkpoint -------------------------------------------------------------


def test_weights_alone(tmp_path: Path) -> None:
    path = other_run(tmp_path / "other", lanes=3)
    decision = open_folder(tmp_path / "run", checkpoint={"initial_load_path": str(path)}).decision
    assert (decision.action, decision.step, decision.num_lanes) == ("new", 0, 4)
    assert decision.notices == (f"The weights come from {path}.",)


def test_everything_goes_on(tmp_path: Path) -> None:
    path = other_run(tmp_path / "other")
    opened = open_folder(tmp_path / "run", checkpoint=full(path))
    decision = opened.decision
    assert (decision.action, decision.step) == ("new", 8)
    assert (decision.global_batch_size, decision.num_lanes) == (16, 8)
    assert decision.run_id != "other"
    # It died before its first checkpoint: the same start again.
    (tmp_path / "run" / "metrics.jsonl").write_text("{}\n")
    again = open_folder(tmp_path / "run", checkpoint=full(path)).decision
    assert (again.action, again.step, again.num_lanes) == ("resume", 8, 8)
    # Its own checkpoints win, and the path need not exist any more.
    plant_step(tmp_path / "run", 10, again.run_id)
    own = open_folder(tmp_path / "run", checkpoint=full(tmp_path / "gone")).decision
    assert (own.action, own.step) == ("resume", 10)
    assert "initial_load_path is ignored" in " ".join(own.notices)


def test_parts_are_left_out(tmp_path: Path) -> None:
    path = other_run(tmp_path / "other", step=30)
    message = refused(tmp_path / "run", checkpoint=full(path))
    assert "training.steps = 20" in message and "already at step 30" in message
    settings = full(path, "lr_scheduler", "train_state")
    assert open_folder(tmp_path / "run", checkpoint=settings).decision.step == 0
    settings = full(path, "lr_scheduler", "train_state", "dataloader")
    decision = open_folder(tmp_path / "run-2", checkpoint=settings, data={"lanes": 2}).decision
    assert decision.num_lanes == 2
    state = {"step": 3, "num_tokens_seen": 4, "lane_states": {}, "data_fingerprint": "f"}
    assert without_excluded(state, ["optimizer"]) == state
    kept = without_excluded(state, ["train_state"])
    assert kept == {"lane_states": {}, "data_fingerprint": "f"}
    assert without_excluded(state, ["dataloader"]) == {"step": 3, "num_tokens_seen": 4}


def test_other_lanes_cannot_go_on(tmp_path: Path) -> None:
    path = other_run(tmp_path / "other")
    message = refused(tmp_path / "run", checkpoint=full(path), data={"lanes": 4})
    assert "data.lanes = 4: is 8 in" in message


def test_lanes_must_fit_the_mesh(tmp_path: Path) -> None:
    """Found together with everything else, before a process group exists."""
    from torchtitan.checkpoint.decision import with_stored_batch
    from torchtitan.preflight import ARITHMETIC, preflight

    path = other_run(tmp_path / "other", lanes=2, training={"global_batch_size": 16})
    (tmp_path / "run").mkdir()
    config = make_config(
        tmp_path / "run", checkpoint=full(path), training={"local_batch_size": 1, "dataset": "x"}
    )
    context = RunContext(config, 4, "cpu")
    assert "data.lanes" not in [issue.key for issue in preflight(context, [ARITHMETIC])]
    stored = with_stored_batch(context)
    assert "data.lanes" in [issue.key for issue in preflight(stored, [ARITHMETIC])]


def make_file(path: Path, name: str) -> Path:
    path.mkdir(exist_ok=True)
    (path / name).write_text("")
    return path


def pickled(path: Path) -> Path:
    """A folder with a file that begins as those of `torch.save` do."""
    (make_file(path, "model.pt") / "model.pt").write_bytes(b"PK\x03\x04")
    return path


def test_paths_that_are_no_checkpoint(tmp_path: Path) -> None:
    other = other_run(tmp_path / "other")
    damaged = other_run(tmp_path / "damaged")
    (damaged / "__0_0.distcp").write_text("tens")
    open_to_all = other_run(tmp_path / "open")
    open_to_all.chmod(0o777)
    cases = {
        tmp_path / "gone": "does not exist",
        pickled(tmp_path / "w") / "model.pt": "torchtitan convert",
        make_file(tmp_path / "bin", "pytorch_model.bin"): "from_pretrained('IN').save_pretrained(",
        make_file(tmp_path / "notes", "notes.txt"): "is no checkpoint: neither torch.distributed",
        other.parent: f"holds steps 8. Fix: choose one, such as {other}",
        damaged: "is damaged",
        open_to_all: "checkpoint.trust_path",
    }
    for path, text in cases.items():
        section = {"initial_load_path": str(path)}
        message = refused(tmp_path / "run", checkpoint=section)
        assert "checkpoint.initial_load_path" in message and text in message
    trusting = {"initial_load_path": str(open_to_all), "trust_path": True}
    assert open_folder(tmp_path / "run", checkpoint=trusting).decision.action == "new"


def test_path_of_another_machine_is_a_warning(tmp_path: Path) -> None:
    config = make_config(tmp_path, checkpoint={"initial_load_path": str(tmp_path / "gone")})
    (problem,) = check_environment(replace(RunContext(config, 1, "cpu"), full=False))
    assert problem.missing_asset


def test_weights_alone_cannot_go_on(tmp_path: Path) -> None:
    plain = make_file(tmp_path / "plain", ".metadata")
    assert open_folder(tmp_path / "a", checkpoint={"initial_load_path": str(plain)})
    message = refused(tmp_path / "run", checkpoint=full(plain))
    assert "checkpoint.initial_load_model_only = false" in message
    plant_step(tmp_path / "other", 3, "other", model_only=True)
    only_model = tmp_path / "other" / "checkpoint" / "step-3"
    assert "holds only a model" in refused(tmp_path / "run", checkpoint=full(only_model))
    for names in (["model.safetensors"], ["params.json", "consolidated.00.pth"]):
        foreign = tmp_path / names[0]
        for name in names:
            make_file(foreign, name)
        assert open_folder(
            tmp_path / f"of {names[0]}", checkpoint={"initial_load_path": str(foreign)}
        )
        assert "holds only a model" in refused(tmp_path / "run", checkpoint=full(foreign))


@pytest.mark.parametrize(
    ("excluded", "text"),
    [
        (["data_loader"], 'did you mean "dataloader"?'),
        (["model"], "is not a part that can be excluded"),
        (["lr_scheduler"], "neither can be excluded alone"),
        (["train_state"], "neither can be excluded alone"),
        (["optimizer"], "warmup"),
    ],
)
def test_exclusions_that_make_no_sense(tmp_path: Path, excluded: list[str], text: str) -> None:
    message = problems(tmp_path, checkpoint=full(tmp_path, *excluded))
    assert message.startswith("checkpoint.exclude_from_loading") and text in message


def test_exclusions_that_would_do_nothing(tmp_path: Path) -> None:
    excluded = {"exclude_from_loading": ["dataloader"]}
    for section in (excluded, {**excluded, "initial_load_path": "/x"}):
        assert "takes over more than weights" in problems(tmp_path, checkpoint=section)
    sensible = full(tmp_path, "optimizer", "lr_scheduler", "train_state", "dataloader")
    assert problems(tmp_path, checkpoint=sensible) == ""


# --- what is saved --------------------------------------------------------------------------------


def test_load_only_and_initial_path_need_checkpoints(tmp_path: Path) -> None:
    for section in ({"load_only": True}, {"initial_load_path": "/x"}):
        (key,) = section
        message = problems(tmp_path, checkpoint={"enable": False, **section})
        assert message.startswith(f"checkpoint.{key}") and "has no effect" in message


def test_export_dtype_needs_an_export(tmp_path: Path) -> None:
    section = {"export_dtype": "bfloat16"}
    assert "checkpoint.last_save_model_only" in problems(tmp_path, checkpoint=section)
    assert problems(tmp_path, checkpoint={**section, "last_save_model_only": True}) == ""


def test_job_that_only_loaded_does_not_finish_the_run(tmp_path: Path) -> None:
    stopped_run(tmp_path, 5)
    opened: RunFolder = open_folder(tmp_path, checkpoint={"load_only": True})
    opened.set_status("completed", 20, 0)
    decision = open_folder(tmp_path).decision
    assert (decision.action, decision.step) == ("resume", 5)
