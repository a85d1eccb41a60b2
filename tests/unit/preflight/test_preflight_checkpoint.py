"""Bad checkpoint settings and unusable folders, each refused with its key and a way out."""

import os
import shutil
from dataclasses import replace
from pathlib import Path
from types import SimpleNamespace
from typing import Any

import pytest

from torchtitan.checkpoint.manifest import Manifest, record_file, write_manifest
from torchtitan.checkpoint.run_folder import RunFolder
from torchtitan.config import ConfigIssue, JobConfig
from torchtitan.config.run_context import RunContext
from torchtitan.preflight.checkpoint import check_environment, check_static


def context(tmp_path: Path | None = None, steps: int = 500, **section: Any) -> RunContext:
    config = JobConfig.model_validate(
        {
            "job": {"dump_folder": str(tmp_path or "outputs")},
            "training": {"steps": steps},
            "checkpoint": {"enable": True, **section},
        }
    )
    return RunContext(config, 1, "cpu")


def only(problems: list[ConfigIssue], key: str, text: str, severity: str = "error") -> None:
    (problem,) = problems
    assert problem.key == key
    assert text in str(problem)
    assert problem.severity == severity


def plant(folder: Path, *steps: int, size: int = 10) -> None:
    info = {"config": context(folder).config.model_dump(exclude_none=True)}
    for step in steps:
        path = folder / "checkpoint" / f"step-{step}"
        path.mkdir(parents=True)
        with open(path / "__0_0.distcp", "wb") as file:
            file.truncate(size)
        files = {"__0_0.distcp": record_file(path / "__0_0.distcp")}
        write_manifest(path, Manifest("run", step, False, files, {}, info=info))


@pytest.mark.parametrize("name", ["", "..", ".hidden", "a/b", "/abs", "a..b", "sp ace", "x" * 129])
def test_folder_name(name: str) -> None:
    only(check_static(context(folder=name)), "checkpoint.folder", "is not a plain name")


@pytest.mark.parametrize(
    ("path", "text"),
    [("", "is not a path"), ("a\0b", "is not a path"), ("s3://bucket/run", "is a URI")],
)
def test_paths_of_no_file_system(path: str, text: str) -> None:
    if "://" not in path:
        only(check_static(context(initial_load_path=path)), "checkpoint.initial_load_path", text)
    asked = context()
    job = asked.config.job.model_copy(update={"dump_folder": path})
    asked = replace(asked, config=asked.config.model_copy(update={"job": job}))
    only(check_static(asked), "job.dump_folder", text)


@pytest.mark.parametrize("name", ["wandb", "config.toml", "previous-3"])
def test_folder_name_taken(name: str) -> None:
    only(
        check_static(context(folder=name)), "checkpoint.folder", "something else in the run folder"
    )


def test_good_settings() -> None:
    assert check_static(context(folder="ckpt_1.a-b", keep_latest_k=0)) == []


def test_keep_only_one() -> None:
    only(check_static(context(keep_latest_k=1)), "checkpoint.keep_latest_k", "use 2 or more")


def test_interval_beyond_the_end() -> None:
    problems = check_static(context(interval=5001, steps=5000))
    only(problems, "checkpoint.interval", "more than training.steps = 5000", "warning")
    assert check_static(context(interval=501)) == [], "a short run loses little"


def test_long_run_without_checkpoints() -> None:
    problems = check_static(context(enable=False, steps=5000))
    only(problems, "checkpoint.enable", "cannot be resumed", "warning")
    assert check_static(context(enable=False)) == []


def test_load_step_without_checkpoints() -> None:
    only(check_static(context(enable=False, load_step=3)), "checkpoint.load_step", "has no effect")


def test_fresh_folder(tmp_path: Path) -> None:
    assert [
        p for p in check_environment(context(tmp_path / "a" / "b")) if p.severity == "error"
    ] == []
    assert not (tmp_path / "a").exists(), "a probe writes nothing"


def test_dump_folder_is_a_file(tmp_path: Path) -> None:
    (tmp_path / "file").write_text("")
    only(check_environment(context(tmp_path / "file")), "job.dump_folder", "file is not a folder")
    only(
        check_environment(context(tmp_path / "file" / "run")),
        "job.dump_folder",
        "file is not a folder",
    )


def test_dump_folder_is_read_only(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    # Root may write anywhere, and tests often run as root.
    monkeypatch.setattr(os, "access", lambda path, mode: False)
    problems = check_environment(context(tmp_path))
    only(problems, "job.dump_folder", "is not writable")
    assert problems[0].missing_asset


@pytest.mark.skipif(not Path("/dev/shm").is_dir(), reason="no file system in memory here")
def test_folder_in_memory() -> None:
    problems = check_environment(context(Path("/dev/shm/run-that-does-not-exist")))
    only(problems, "job.dump_folder", "tmpfs", "warning")


@pytest.mark.parametrize(
    "part", [".", "checkpoint", "checkpoint/step-5", "checkpoint/step-5/manifest.json"]
)
def test_part_that_anybody_may_write_to(tmp_path: Path, part: str) -> None:
    plant(tmp_path, 5)
    assert errors(tmp_path) == []
    (tmp_path / part).chmod(0o777)
    only(errors(tmp_path), "checkpoint.folder", "writable by all users")
    assert errors(tmp_path, trust_path=True) == []


def test_folder_that_anybody_may_replace(tmp_path: Path) -> None:
    """Where /tmp has its sticky bit, nobody can."""
    plant(tmp_path / "run", 5)
    assert check_environment(context(tmp_path / "run")) == []
    tmp_path.chmod(0o777)
    only(
        check_environment(context(tmp_path / "run")),
        "job.dump_folder",
        f"lies below {tmp_path}",
        "warning",
    )
    tmp_path.chmod(0o1777)
    assert check_environment(context(tmp_path / "run")) == []


def test_run_is_protected_whatever_the_umask(tmp_path: Path) -> None:
    before = os.umask(0)
    try:
        plant(tmp_path / "run", 5)
        asked = context(tmp_path / "other" / "run")
        RunFolder.open(asked.config, asked).close()
    finally:
        os.umask(before)
    assert not (tmp_path / "other" / "run").stat().st_mode & 0o002
    assert not (tmp_path / "run/checkpoint/step-5/manifest.json").stat().st_mode & 0o002


def errors(tmp_path: Path, **section: Any) -> list[ConfigIssue]:
    return [p for p in check_environment(context(tmp_path, **section)) if p.severity == "error"]


def test_load_step(tmp_path: Path) -> None:
    only(errors(tmp_path, load_step=7), "checkpoint.load_step", "there are none")
    plant(tmp_path, 5, 10)
    only(errors(tmp_path, load_step=7), "checkpoint.load_step", "saved steps: 5, 10")
    assert errors(tmp_path, load_step=10) == []
    (tmp_path / "checkpoint" / "step-10" / "manifest.json").unlink()
    only(errors(tmp_path, load_step=10), "checkpoint.load_step", "is damaged")


def test_rewind(tmp_path: Path) -> None:
    plant(tmp_path, 5, 10, 15)
    only(errors(tmp_path, load_step=5), "checkpoint.load_step", "older than steps 10, 15")
    assert errors(tmp_path, load_step=5, allow_rewind=True) == []


def test_another_run_in_the_folder(tmp_path: Path) -> None:
    """What a start would refuse is found with everything else, and by a check on its own."""
    plant(tmp_path, 5)
    before = sorted(tmp_path.rglob("*"))
    only(errors(tmp_path, steps=400), "training.steps", "is 500 in the run")
    only(errors(tmp_path, enable=False), "checkpoint.enable", "steps [5] are saved")
    asked = context(tmp_path, steps=400)
    job = asked.config.job.model_copy(update={"new_run": True})
    anew = replace(asked, config=asked.config.model_copy(update={"job": job}))
    assert [problem for problem in check_environment(anew) if problem.severity == "error"] == []
    assert sorted(tmp_path.rglob("*")) == before


def test_absent_folder_of_another_machine(tmp_path: Path) -> None:
    (tmp_path / "file").write_text("")
    away = replace(context(tmp_path / "file" / "run", load_step=3), full=False)
    assert check_environment(away) == []


def test_finished_run_needs_no_space(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    plant(tmp_path, 500)
    usage = shutil.disk_usage(tmp_path)
    monkeypatch.setattr(shutil, "disk_usage", lambda path: usage._replace(free=0))
    assert errors(tmp_path) == []


def test_no_good_checkpoint(tmp_path: Path) -> None:
    plant(tmp_path, 5, 10)
    (tmp_path / "checkpoint" / "step-10" / "__0_0.distcp").unlink()
    assert errors(tmp_path) == []
    (tmp_path / "checkpoint" / "step-5" / "__0_0.distcp").write_bytes(b"half")
    only(errors(tmp_path), "checkpoint.folder", "none of which is a valid checkpoint")


def test_link_for_a_step(tmp_path: Path) -> None:
    plant(tmp_path, 5)
    (tmp_path / "checkpoint" / "step-6").symlink_to(tmp_path / "checkpoint" / "step-5")
    only(errors(tmp_path), "checkpoint.folder", "step-6, which is a link")


def test_no_space_for_the_next(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    plant(tmp_path, 5, size=2**20)
    assert errors(tmp_path) == []
    usage = shutil.disk_usage(tmp_path)
    monkeypatch.setattr(shutil, "disk_usage", lambda path: usage._replace(free=2**20))
    only(errors(tmp_path), "checkpoint.folder", "for the next checkpoint")


def statvfs(**counts: int) -> Any:
    """What the kernel says about a file system with much space, and its files."""
    space = {"f_frsize": 4096, "f_blocks": 10**9, "f_bfree": 10**9, "f_bavail": 10**9}
    return lambda path: SimpleNamespace(**space, **counts)


def test_no_files_left_for_the_next(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    plant(tmp_path, 5)
    monkeypatch.setattr(os, "statvfs", statvfs(f_files=1000, f_favail=1))
    only(errors(tmp_path), "checkpoint.folder", "has room for 1 (its inodes are used up)")
    problems = [
        p
        for p in check_environment(context(tmp_path, allow_low_disk=True))
        if "inodes" in p.problem
    ]
    only(problems, "checkpoint.folder", "has room for 1", "warning")
    assert errors(tmp_path, allow_low_disk=True) == []
    # As file systems say that make room for files as they come.
    monkeypatch.setattr(os, "statvfs", statvfs(f_files=0, f_favail=0))
    assert errors(tmp_path) == []
