"""`Run`: a run folder, read. No torch but in `load`."""

from __future__ import annotations

import os
from pathlib import Path
from typing import TYPE_CHECKING, Any

from torchtitan.checkpoint.steps_folder import step_name
from torchtitan.checkpoint.stored_run import CONFIG_NAME, METRICS_NAME, StoredRun
from torchtitan.config import ConfigError, ConfigIssue, JobConfig
from torchtitan.config.load import load_toml
from torchtitan.config.paths import expand_path
from torchtitan.config.suggest import did_you_mean
from torchtitan.metrics.records import read_records

if TYPE_CHECKING:
    from torch import nn

    from torchtitan.data.tokenizers import Tokenizer


class Run:
    """The run in a folder, whether it is at work or has ended.

    Everything is read from the files when it is asked for, and nothing is written.
    """

    def __init__(self, folder: str | Path):
        """Raise ConfigError if `folder`, a `job.dump_folder`, holds no run."""
        self.folder = Path(expand_path(os.fspath(folder))).resolve()
        if not self._stored().is_run:
            fix = "name the job.dump_folder of a run"
            raise ConfigError(ConfigIssue("Run", "holds no run", fix, str(folder)))

    @property
    def status(self) -> dict[str, Any]:
        """The content of `run_status.json`: `status`, `step`, `exit_code`, `error` and others."""
        return self._stored().status

    @property
    def config(self) -> JobConfig:
        """The config of the newest start, as in `config.toml`. Raises ConfigError."""
        return load_toml(self.folder / CONFIG_NAME)

    @property
    def checkpoints(self) -> dict[int, Path]:
        """The folders of the valid checkpoints, by step."""
        stored = self._stored()
        steps = [manifest.step for manifest in stored.good]
        return {step: stored.checkpoints / step_name(step) for step in steps}

    def metrics(self) -> dict[str, list[Any]]:
        """Return what was logged as a table: columns by name, with one row a step.

        `pandas.DataFrame(run.metrics())` takes it. A value that a step lacks is None. The names
        are those of `metrics.jsonl`; see docs/guides/metrics.md.
        """
        rows: dict[int, dict[str, Any]] = {}
        if (self.folder / METRICS_NAME).exists():
            for record in read_records(self.folder / METRICS_NAME):
                rows.setdefault(record["step"], {}).update(record)
        names = dict.fromkeys(name for row in rows.values() for name in row)
        return {name: [row.get(name) for row in rows.values()] for name in names}

    def load(self, step: int | None = None) -> tuple[nn.Module, Tokenizer]:
        """Return model and tokenizer of a checkpoint, by default the newest one, as `load` does.

        Raises ConfigError if there is none of that step, and CheckpointError for a damaged one.
        """
        from torchtitan.api.text import load

        if step is None:
            return load(self.folder)
        found = self.checkpoints
        if step not in found:
            fix = did_you_mean(str(step), [str(each) for each in found])
            raise ConfigError(ConfigIssue("step", "has no valid checkpoint", fix, step))
        return load(found[step])

    def __repr__(self) -> str:
        status, losses = self.status, self.metrics().get("loss", [])
        text = f"{status.get('status', 'unknown')}, step {status.get('step', 0)}"
        loss = next((loss for loss in reversed(losses) if loss is not None), None)
        return f"<Run {str(self.folder)!r}: {text}{'' if loss is None else f', loss {loss:.4f}'}>"

    def _stored(self) -> StoredRun:
        return StoredRun(self.folder, "checkpoint")
