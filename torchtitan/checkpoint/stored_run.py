"""The run that a run folder holds, and the data it was trained with. Only reads. No torch."""

import json
from collections.abc import Callable, Mapping
from functools import cached_property
from pathlib import Path
from typing import TYPE_CHECKING, Any

from torchtitan.checkpoint.config_diff import read_stored_config, stored_value
from torchtitan.checkpoint.initial import initial_path, without_excluded
from torchtitan.checkpoint.manifest import Manifest, read_manifest
from torchtitan.checkpoint.steps_folder import inspect_steps, step_folders, step_name
from torchtitan.config import ConfigIssue, JobConfig
from torchtitan.config.schema import Checkpoint

if TYPE_CHECKING:
    from torchtitan.checkpoint.decision import Decision

CONFIG_NAME = "config.toml"
STATUS_NAME = "run_status.json"
METRICS_NAME = "metrics.jsonl"
RECORD_NAME = "record.jsonl"
"""Losses, gradient norms and digests of gradients, for `torchtitan replay`."""
TOKENIZER_NAME = "tokenizer"
"""The folder with a copy of the tokenizer's files."""
HF_NAME = "hf"
"""The folder of exports, in a run's folder."""
STOP_NAME = "stop"
"""Somebody who makes this file asks the run to stop."""
PENDING_NAME = ".new_run"
"""A mark: a start with `job.new_run` has been made and has not begun."""


class StoredRun:
    """The run in the folder `path`, if any; manifests are read on first use.

    `default_folder` is the name of the checkpoint folder unless a stored config names another.
    """

    def __init__(self, path: Path, default_folder: str):
        self._config_file = path / CONFIG_NAME
        self.status = _read_status(path / STATUS_NAME)
        """The content of `run_status.json`; empty without one."""
        # The stored name counts: a config that renames the folder must not hide the checkpoints.
        stored = read_stored_config(self._config_file) if self.status else None
        name = stored_value(stored or {}, "checkpoint.folder")
        if not isinstance(name, str) or Path(name).name != name or name in ("", ".."):
            name = default_folder  # the config may be anybody's, and lead out of the folder
        self.checkpoints = path / name
        """The folder of the `step-N` folders."""
        self.step_folders = step_folders(self.checkpoints)
        """Steps that have a folder, valid or not."""
        metrics = path / METRICS_NAME
        self._has_metrics = metrics.exists() and metrics.stat().st_size > 0

    @cached_property
    def good(self) -> list[Manifest]:
        """The manifests of the valid checkpoints, by step."""
        candidates = inspect_steps(self.checkpoints) if self.step_folders else []
        return [candidate.manifest for candidate in candidates if candidate.manifest]

    @cached_property
    def config(self) -> dict[str, Any] | None:
        """The resolved config in the run folder, or else in the newest checkpoint."""
        # A crash of the machine can leave an empty file, which is a valid TOML of defaults.
        return read_stored_config(self._config_file) or self._newest_config

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
        """The newest valid checkpoint."""
        return self.good[-1] if self.good else None

    @property
    def trained(self) -> bool:
        """Return whether a fresh start would lose anything."""
        return bool(self.step_folders or self._has_metrics or self.status.get("step"))

    @property
    def ended(self) -> str:
        """Return `completed` or `data_exhausted` if the run has ended, else an empty string."""
        status = str(self.status.get("status"))
        # The end of a `load_only` job says nothing about the run it loaded from.
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
        """The last step that a later start can rely on."""
        step = self.status.get("step", 0) if self.ended else 0
        return max(step if isinstance(step, int) else 0, self.newest.step if self.newest else 0)

    def planned(self, key: str) -> Any:
        """Return the value of `key` when the run last saved.

        A later start may have raised it and been killed before it saved anything.
        """
        return stored_value(self._newest_config or self.config or {}, key)


def _read_status(path: Path) -> dict[str, Any]:
    try:
        status = json.loads(path.read_text(encoding="utf-8"))
    except OSError:
        return {}
    except ValueError:
        status = None
    # Even a damaged status shows that the folder is a run's.
    return status if isinstance(status, dict) else {"status": "unreadable"}


def stored_state(config: JobConfig, decision: "Decision") -> dict[str, Any]:
    """Return the JSON state that a start continues from; empty at the start of the data.

    `config` is the resolved one. Raises `InvalidCheckpoint`.
    """
    section = config.checkpoint
    if not section.enable or decision.action == "finished":
        return {}
    if decision.action == "resume" and decision.step > 0:
        folder = Path(config.job.dump_folder).resolve() / section.folder
        return read_manifest(folder / step_name(decision.step)).state
    if section.initial_load_path is None or section.initial_load_model_only:
        return {}
    manifest = read_manifest(initial_path(section))
    return without_excluded(manifest.state, section.exclude_from_loading)


def data_problems(
    section: Checkpoint,
    state: Mapping[str, Any],
    fingerprint: str,
    differences: Callable[[Mapping[str, Any] | None], Mapping[str, str]],
) -> list[ConfigIssue]:
    """Return the problems of continuing from a stored `state` with the data of `fingerprint`.

    `differences` compares a stored summary with the data: config key -> what differs.
    """
    if state.get("data_fingerprint") in (None, fingerprint) or section.allow_dataset_change:
        return []
    fix = (
        "restore it, or train in another --job.dump_folder, or anew with --job.new_run;"
        " data.restart begins other data anew, with the next epoch;"
        " checkpoint.allow_dataset_change continues regardless"
    )
    text = "differs from that of the checkpoint, whose position in the data then means nothing"
    return [
        ConfigIssue(key, f"{text}: {how}", fix)
        for key, how in differences(state.get("data_summary")).items()
    ]
