"""Run folders as real runs leave them."""

from pathlib import Path
from typing import Any

import pytest

from torchtitan.checkpoint.manifest import Manifest, record_file, write_manifest
from torchtitan.checkpoint.run_folder import RunFolder
from torchtitan.config import ConfigError, JobConfig
from torchtitan.config.run_context import RunContext


def make_config(folder: Path, **sections: Any) -> JobConfig:
    tables: dict[str, dict[str, Any]] = {
        "job": {"dump_folder": str(folder)},
        "training": {"steps": 20, "local_batch_size": 4},
        "checkpoint": {"enable": True},
    }
    for name, keys in sections.items():
        tables.setdefault(name, {}).update(keys)
    return JobConfig.model_validate(tables)


def open_folder(folder: Path, world_size: int = 1, **sections: Any) -> RunFolder:
    """A start that comes to its first step, unless the run is finished."""
    config = make_config(folder, **sections)
    opened = RunFolder.open(config, RunContext(config, world_size, "cpu"))
    if opened.decision.action != "finished":
        opened.begin()
    opened.close()
    return opened


def refused(folder: Path, **sections: Any) -> str:
    before = snapshot(folder)
    with pytest.raises(ConfigError) as caught:
        open_folder(folder, **sections)
    assert snapshot(folder) == before, "a refused start leaves the folder as it was"
    return str(caught.value)


def snapshot(folder: Path) -> dict[str, bytes]:
    return {
        str(path): path.read_bytes()
        for path in sorted(folder.rglob("*"))
        if path.is_file() and path.name != ".lock"
    }


def plant_step(
    folder: Path, step: int, run_id: str, model_only: bool = False, **parts: dict[str, Any]
) -> None:
    """A committed step, as far as names, sizes and the manifest tell; `parts`: state and info."""
    path = folder / "checkpoint" / f"step-{step}"
    path.mkdir(parents=True)
    (path / "__0_0.distcp").write_text("tensors")
    files = {"__0_0.distcp": record_file(path / "__0_0.distcp")}
    write_manifest(path, Manifest(run_id, step, model_only, files, {}, **parts))


def stopped_run(folder: Path, *steps: int, **sections: Any) -> str:
    """A run that was killed after it had saved `steps`; returns its id."""
    run_id = open_folder(folder, **sections).decision.run_id
    (folder / "metrics.jsonl").write_text("{}\n")
    for step in steps:
        plant_step(folder, step, run_id)
    return run_id


def finished_run(folder: Path, *steps: int, model_only: bool = False, **kinds: Any) -> str:
    opened = open_folder(folder)
    run_id = opened.decision.run_id
    for step in steps:
        plant_step(folder, step, run_id, model_only)
    opened.set_status(kinds.get("status", "completed"), kinds.get("step", 20), 0)
    return run_id


def saved_by(opened: RunFolder, *steps: int) -> None:
    """What a start saves after these steps."""
    info = {key: value for key, value in opened.run_info().items() if key != "run_id"}
    for step in steps:
        plant_step(opened.path, step, opened.decision.run_id, info=info)
        opened.set_status("running", step)
