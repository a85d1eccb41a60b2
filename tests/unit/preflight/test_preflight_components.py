"""Settings that cannot work together, and folders that cannot be written."""

import importlib.util
import math
import os
import subprocess
import sys
import tempfile
from dataclasses import replace
from pathlib import Path
from typing import Any

import pytest

from torchtitan.config import ConfigIssue, JobConfig
from torchtitan.config.run_context import RunContext
from torchtitan.preflight import optim, outputs
from torchtitan.preflight.model import build_on_meta
from torchtitan.preflight.outputs import check_environment


def check_static(context: RunContext) -> list[ConfigIssue]:
    return [*optim.check_static(context), *outputs.check_static(context)]


def context(**sections: dict[str, Any]) -> RunContext:
    config = {"training": {"steps": 1000}, "lr_scheduler": {"warmup_steps": 100}, **sections}
    return RunContext(config=JobConfig(**config), world_size=1, device_type="cpu")


def only(problems: list[ConfigIssue], key: str) -> ConfigIssue:
    assert [problem.key for problem in problems] == [key]
    return problems[0]


def test_defaults_are_fine() -> None:
    assert check_static(RunContext(config=JobConfig(), world_size=1, device_type="cpu")) == []
    assert check_static(context()) == []


def test_learning_rate_of_zero_is_a_warning() -> None:
    problem = only(check_static(context(optimizer={"lr": 0.0})), "optimizer.lr")
    assert problem.severity == "warning"


def test_repeated_pattern() -> None:
    groups = [{"pattern": "a*"}, {"pattern": "b*"}, {"pattern": "a*"}]
    problem = only(
        check_static(context(optimizer={"param_groups": groups})),
        "optimizer.param_groups[2].pattern",
    )
    assert "param_groups[0]" in problem.problem


def test_warmup_longer_than_the_run() -> None:
    problems = check_static(context(training={"steps": 50}, lr_scheduler={"warmup_steps": 51}))
    problem = only(problems, "lr_scheduler.warmup_steps")
    assert "training.steps = 50" in problem.problem and "at most 50" in problem.fix
    assert check_static(context(training={"steps": 50}, lr_scheduler={"warmup_steps": 50})) == []


def test_a_schedule_longer_than_the_run() -> None:
    """Warmup and decay are those of the schedule; it may not be the shorter one."""
    longer = {"warmup_steps": 1500, "decay_ratio": 0.25, "total_steps": 2000}
    assert check_static(context(lr_scheduler=longer)) == []
    problems = check_static(context(lr_scheduler={"total_steps": 999}))
    assert "training.steps = 1000" in only(problems, "lr_scheduler.total_steps").problem


def test_a_record_of_gradients_that_are_gone() -> None:
    in_backward = {"early_step_in_backward": True}
    sections = {"optimizer": in_backward, "training": {"steps": 1000, "max_norm": math.inf}}
    assert check_static(context(**sections)) == []
    assert only(check_static(context(**sections, debug={"record": 5})), "debug.record")


def test_warmup_and_decay_longer_than_the_run() -> None:
    schedule = {"warmup_steps": 300, "decay_ratio": 0.701}
    problem = only(check_static(context(lr_scheduler=schedule)), "lr_scheduler.decay_ratio")
    assert "701 steps" in problem.problem and "shorten the warmup" in problem.fix
    assert check_static(context(lr_scheduler={**schedule, "decay_ratio": 0.7})) == []


def test_profiler_steps_must_fit_between_traces() -> None:
    profiling = {
        "enable_profiling": True,
        "profile_freq": 4,
        "profiler_warmup": 3,
        "profiler_active": 2,
    }
    problem = only(check_static(context(profiling=profiling)), "profiling.profile_freq")
    assert problem.severity == "error" and "at least 5" in problem.fix
    assert check_static(context(profiling={**profiling, "profile_freq": 5})) == []
    assert check_static(context(profiling={**profiling, "enable_profiling": False})) == []


def test_run_too_short_for_a_trace_is_a_warning() -> None:
    profiling = {"enable_profiling": True, "profile_freq": 1001}
    problem = only(check_static(context(profiling=profiling)), "profiling.profile_freq")
    assert problem.severity == "warning"


@pytest.mark.parametrize("name", ["", "..", "../tb", "/tmp/tb", ".hidden", "a b", "x" * 129])
def test_folder_names_stay_below_the_run_folder(name: str) -> None:
    only(check_static(context(metrics={"save_tb_folder": name})), "metrics.save_tb_folder")
    only(
        check_static(context(profiling={"save_traces_folder": name})),
        "profiling.save_traces_folder",
    )
    key = "save_memory_snapshot_folder"
    only(check_static(context(profiling={key: name})), f"profiling.{key}")
    only(check_static(context(comm={"save_traces_folder": name})), "comm.save_traces_folder")


@pytest.mark.parametrize("name", ["metrics", "wandb", "config.toml"])
def test_names_of_the_run_folder_are_taken(name: str) -> None:
    problem = only(
        check_static(context(metrics={"save_tb_folder": name})), "metrics.save_tb_folder"
    )
    assert "something else in the run folder" in problem.problem


@pytest.mark.parametrize("prefix", ["", "a/", "../rank_", ".rank_", "rank_1", "r k"])
def test_prefix_of_traces_of_collectives(prefix: str) -> None:
    settings = {"save_traces_file_prefix": prefix}
    only(check_static(context(comm=settings)), "comm.save_traces_file_prefix")


@pytest.mark.parametrize("prefix", ["r", "rank_", "node-1.rank-"])
def test_good_prefixes(prefix: str) -> None:
    assert check_static(context(comm={"save_traces_file_prefix": prefix})) == []


def test_memory_snapshots_need_a_gpu() -> None:
    snapshots = context(profiling={"enable_memory_snapshot": True})
    problem = only(check_static(snapshots), "profiling.enable_memory_snapshot")
    assert problem.severity == "error" and "CUDA" in problem.problem
    assert check_static(replace(snapshots, device_type="cuda")) == []


def test_a_run_too_short_for_a_snapshot_is_a_warning() -> None:
    profiling = {"enable_memory_snapshot": True, "profile_freq": 1001}
    snapshots = replace(context(profiling=profiling), device_type="cuda")
    problem = only(check_static(snapshots), "profiling.profile_freq")
    assert problem.severity == "warning"


def test_folders_must_differ() -> None:
    problem = only(
        check_static(context(metrics={"save_tb_folder": "checkpoint"})), "metrics.save_tb_folder"
    )
    assert "checkpoint.folder" in problem.problem


def probed(dump_folder: Path, full: bool = True) -> list[ConfigIssue]:
    asked = context(
        job={"dump_folder": str(dump_folder)},
        metrics={"enable_tensorboard": True},
        profiling={"enable_profiling": True, "enable_memory_snapshot": True},
    )
    return check_environment(replace(asked, full=full))


def test_probe_creates_nothing_and_accepts_a_writable_folder(tmp_path: Path) -> None:
    assert probed(tmp_path / "new" / "run") == []
    assert list(tmp_path.iterdir()) == []


def test_probe_finds_a_file_in_the_way(tmp_path: Path) -> None:
    (tmp_path / "tb").write_text("in the way")
    problem = only(probed(tmp_path), "metrics.save_tb_folder")
    assert problem.problem == f"{tmp_path / 'tb'} is not a folder"


def test_a_dump_folder_that_is_none_is_told_once(tmp_path: Path) -> None:
    """By the checks of the run folder."""
    (tmp_path / "file").write_text("")
    assert probed(tmp_path / "file") == probed(tmp_path / ("x" * 300)) == []


def test_probe_looks_where_the_run_will_write(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    (tmp_path / "runs").mkdir()
    (tmp_path / "runs" / "tb").write_text("in the way")
    monkeypatch.setenv("HOME", str(tmp_path))
    problem = only(probed(Path("~/runs")), "metrics.save_tb_folder")
    assert problem.problem == f"{tmp_path / 'runs' / 'tb'} is not a folder"


def test_probe_finds_a_folder_that_is_not_writable() -> None:
    with tempfile.TemporaryDirectory() as folder:
        os.chmod(folder, 0o555)
        child = os.fork()
        if child == 0:  # root may write anywhere, so not as root
            try:
                if os.geteuid() == 0:
                    os.setuid(65534)
                keys = [problem.key for problem in probed(Path(folder))]
                expected = [
                    "metrics.save_tb_folder",
                    "profiling.save_traces_folder",
                    "profiling.save_memory_snapshot_folder",
                ]
                os._exit(0 if keys == expected else 1)
            finally:
                os._exit(2)
        assert os.waitpid(child, 0)[1] == 0
        os.chmod(folder, 0o755)


def test_the_home_folder_is_meant_by_a_tilde(tmp_path: Path, monkeypatch) -> None:
    monkeypatch.setenv("HOME", str(tmp_path))
    (tmp_path / "run").mkdir()
    (tmp_path / "run" / "tb").write_text("in the way")
    problem = only(probed(Path("~/run")), "metrics.save_tb_folder")
    assert problem.problem == f"{tmp_path / 'run' / 'tb'} is not a folder"


def test_a_check_for_another_machine(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    """Neither its folders nor its packages need be here."""
    monkeypatch.setattr(os, "access", lambda path, mode: False)
    assert probed(tmp_path / "run") != []
    assert probed(tmp_path / "run", full=False) == []
    assert all(problem.missing_asset for problem in probed(tmp_path))
    monkeypatch.setattr(importlib.util, "find_spec", lambda name: None)
    switches = {"enable_tensorboard": True, "enable_wandb": True}
    absent = check_environment(
        context(job={"dump_folder": str(tmp_path / "run")}, metrics=switches)
    )
    absent = [problem for problem in absent if "is not installed" in problem.problem]
    assert [problem.key for problem in absent] == [f"metrics.{name}" for name in switches]
    assert all(problem.missing_asset for problem in absent)


def test_patterns_are_matched_with_the_model() -> None:
    model = build_on_meta(context())
    assert optim.check_model(context(), model) == []
    groups = [{"pattern": "*norm.weight"}, {"pattern": "layers.9*"}, {"pattern": "norm.*"}]
    lost, shadowed = optim.check_model(context(optimizer={"param_groups": groups}), model)
    assert lost.key == "optimizer.param_groups[1].pattern" and "tok_embeddings" in lost.fix
    assert "earlier patterns already take all it matches, such as norm.weight" in shadowed.problem


def test_checks_import_no_torch() -> None:
    modules = "torchtitan.preflight.optim, torchtitan.preflight.outputs"
    code = f"import sys, {modules}; sys.exit('torch' in sys.modules)"
    assert subprocess.run([sys.executable, "-c", code], check=False).returncode == 0
