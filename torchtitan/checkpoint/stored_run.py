"""`StoredRun`: what a run folder says about the run in it. Only reads. No torch."""

import json
from dataclasses import dataclass
from functools import cached_property
from pathlib import Path
from typing import Any

from torchtitan.checkpoint.config_diff import read_stored_config, stored_value
from torchtitan.checkpoint.manifest import Manifest
from torchtitan.checkpoint.steps_folder import inspect_steps, step_folders
from torchtitan.config import JobConfig

CONFIG_NAME = "config.toml"
STATUS_NAME = "run_status.json"
METRICS_NAME = "metrics.jsonl"


@dataclass(frozen=True)
class StoredRun:
    """The run that a folder holds, if any. Manifests are read when they are asked for."""

    status: dict[str, Any]
    """The content of `run_status.json`; empty without one."""
    checkpoint_folder: Path
    step_folders: list[int]
    """Steps that have a folder, whole or not."""
    has_metrics: bool
    config_file: Path

    @cached_property
    def good(self) -> list[Manifest]:
        """Manifests of the whole checkpoints, by step."""
        candidates = inspect_steps(self.checkpoint_folder) if self.step_folders else []
        return [candidate.manifest for candidate in candidates if candidate.manifest]

    @cached_property
    def config(self) -> dict[str, Any] | None:
        """The resolved config of the run: of its folder, or else of its newest checkpoint."""
        # A crash of the machine can leave an empty file, which is a valid TOML of defaults.
        return read_stored_config(self.config_file) or self._newest_config

    @property
    def _newest_config(self) -> dict[str, Any] | None:
        """The config that the newest checkpoint was saved with."""
        kept = self.newest.info.get("config") if self.newest else None
        return kept if isinstance(kept, dict) else None

    @property
    def is_run(self) -> bool:
        """Return whether the folder holds a run at all."""
        return bool(self.status or self.good)

    @property
    def is_seed(self) -> bool:
        """Return whether it is a seed checkpoint: nothing was trained yet."""
        return stored_value(self.config or {}, "checkpoint.create_seed_checkpoint") is True

    @property
    def newest(self) -> Manifest | None:
        """The newest whole checkpoint."""
        return self.good[-1] if self.good else None

    @property
    def trained(self) -> bool:
        """Return whether there is anything in it that a fresh start would lose."""
        return bool(self.step_folders or self.has_metrics or self.status.get("step"))

    @property
    def ended(self) -> str:
        """Return how the run ended, if it did: completed or data_exhausted."""
        status = str(self.status.get("status"))
        # A job with `load_only` trained for itself: what is saved is as it was.
        aside = stored_value(self.config or {}, "checkpoint.load_only") is True and self.good
        if status in ("completed", "data_exhausted") and not aside:
            return status
        # A job that was killed after its last checkpoint had no time to write the status.
        newest = self.newest
        if newest is None or newest.state.get("finished") is not True:
            return ""
        planned = self.planned("training.steps")
        early = isinstance(planned, int) and newest.step < planned
        return "data_exhausted" if early else "completed"

    @property
    def step(self) -> int:
        """The last step that a later start can count on."""
        step = self.status.get("step", 0) if self.ended else 0
        return max(step if isinstance(step, int) else 0, self.newest.step if self.newest else 0)

    def planned(self, key: str) -> Any:
        """The value of `key` when the run last saved: a later start may have raised it since, and
        may have been killed before it saved anything."""
        return stored_value(self._newest_config or self.config or {}, key)


def read_stored_run(path: Path, config: JobConfig) -> StoredRun:
    """Return what the run folder `path` holds."""
    try:
        status = json.loads((path / STATUS_NAME).read_text(encoding="utf-8"))
    except OSError:
        status = {}
    except ValueError:
        status = None
    # The stored folder name: a config that renames it must not make the checkpoints disappear.
    stored = read_stored_config(path / CONFIG_NAME) if status else None
    name = stored_value(stored or {}, "checkpoint.folder")
    folder = path / (name if isinstance(name, str) else config.checkpoint.folder)
    try:
        has_metrics = (path / METRICS_NAME).stat().st_size > 0
    except OSError:
        has_metrics = False
    # Damaged, it still says that the folder is a run's.
    status = status if isinstance(status, dict) else {"status": "unreadable"}
    return StoredRun(status, folder, step_folders(folder), has_metrics, path / CONFIG_NAME)
