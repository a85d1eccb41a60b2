"""The run folder: lock, config and status of one run. No torch.

`job.dump_folder` belongs to one run. `config.toml` is its resolved config, `tokenizer/` a copy of
its tokenizer's files, `run_status.json` its status (for schedulers: torchrun turns every exit
status into 1), and `.lock` is held while a job runs. `decision` determines what a start in the
folder does. Rank 0 opens the folder before there is a process group; the other ranks learn the
outcome from `share`.
"""

import json
import os
import shutil
import sys
import time
from collections.abc import Callable
from dataclasses import asdict, replace
from importlib.metadata import version
from pathlib import Path
from typing import TYPE_CHECKING, Any, Literal

from torchtitan import __version__
from torchtitan.checkpoint.config_diff import read_stored_config, stored_value
from torchtitan.checkpoint.decision import (
    LOAD_STEP_NAME,
    Decision,
    decide,
    resolved_config,
)
from torchtitan.checkpoint.files import PRIVATE_TO_WRITE, write_in_place
from torchtitan.checkpoint.lock import FolderInUse, FolderLock
from torchtitan.checkpoint.remote import Uploads, forget_later
from torchtitan.checkpoint.steps_folder import delete_leftovers
from torchtitan.checkpoint.stored_run import (
    CONFIG_NAME,
    HF_NAME,
    METRICS_NAME,
    PENDING_NAME,
    RECORD_NAME,
    STATUS_NAME,
    STOP_NAME,
    TOKENIZER_NAME,
    StoredRun,
)
from torchtitan.config import CheckpointError, ConfigError, ConfigIssue, DataError, JobConfig
from torchtitan.config.exit_codes import DONE
from torchtitan.config.run_context import RunContext
from torchtitan.config.toml_text import config_toml_text
from torchtitan.distributed.hang_report import RECORDS_NAME, REPORT_NAME
from torchtitan.utils.files import sync_folder, write_atomically
from torchtitan.weights.tokenizer_files import copy_tokenizer

if TYPE_CHECKING:
    from torchtitan.distributed.context import DistributedContext

_FOLDER_KEYS = (
    "checkpoint.folder",
    "metrics.save_tb_folder",
    "profiling.save_traces_folder",
    "profiling.save_memory_snapshot_folder",
    "comm.save_traces_folder",
)
_MORE_FOLDERS = ("metrics", "wandb", "ledger")
"""The metrics of all ranks, wandb's files, whose folder it names itself, and the rows of steps."""

Status = Literal["running", "completed", "preempted", "failed", "data_exhausted", "seeded"]


class RunFolder:
    """The opened folder of a run; `config` has batch size and lanes resolved."""

    def __init__(self, path: Path, config: JobConfig, decision: Decision | None, lock: Any):
        self.path = path
        self.config = config
        self._decision = decision
        self._lock = lock
        self._has_begun = False
        self.uploads: Uploads | None = None
        """The uploads to `checkpoint.remote_folder`, on rank 0."""

    @classmethod
    def open(
        cls,
        config: JobConfig,
        context: RunContext,
        is_main: bool = True,
        check: Callable[[JobConfig], None] = lambda config: None,
    ) -> "RunFolder":
        """Lock the folder and decide what this start does.

        Only rank 0 touches the folder; on other ranks `share` must follow. `check` gets the
        resolved config of a run that will be trained, and may reject it. Nothing but a mark of
        a pending `job.new_run` is written before `begin`, and for a finished run what its last
        start did not come to; a stop file, which an earlier start was meant to see, is removed, and
        so are the records of its hang. Raises `ConfigError`.
        """
        path = Path(config.job.dump_folder).resolve()
        if not is_main:
            return cls(path, config, None, None)
        lock = _lock(path)
        try:
            (path / STOP_NAME).unlink(missing_ok=True)
            shutil.rmtree(path / RECORDS_NAME, ignore_errors=True)
            decision = decide(context.config, context, path)
            resolved = replace(context, config=resolved_config(config, decision)).config
            folder = cls(path, resolved, decision, lock)
            if decision.action != "finished":
                check(folder.config)
                if decision.replaces_run:
                    (path / PENDING_NAME).touch()
                lock.name_run(decision.run_id)
            else:
                folder._settle()
        except OSError as error:
            lock.release()
            raise ConfigError(_unwritable(path, error)) from error
        except BaseException:
            lock.release()
            raise
        return folder

    @property
    def decision(self) -> Decision:
        """The decision on this start; on ranks other than 0 only after `share`."""
        assert self._decision is not None, "share() comes first on this rank"
        return self._decision

    @property
    def checkpoint_folder(self) -> Path:
        """The folder of the `step-N` folders."""
        return self.path / self.config.checkpoint.folder

    def share(self, world: "DistributedContext") -> Decision:
        """Take over rank 0's decision and the config that follows from it; all ranks call it."""
        sent = world.broadcast_json(asdict(self.decision) if world.is_main else None)
        self._decision = Decision(**{**sent, "notices": tuple(sent["notices"])})
        self.config = resolved_config(self.config, self._decision)
        return self._decision

    def begin(self) -> None:
        """Write status, config and tokenizer, after moving away a run that this one replaces.

        Rank 0 only.

        Called when nothing can refuse the start any more: a refused start must not change what the
        next one is compared with.
        """
        self._has_begun = True
        if self.decision.replaces_run:
            _move_run_aside(self.path, self.config)
            if self.config.checkpoint.enable:  # this start has opened the folder already
                self.checkpoint_folder.mkdir(mode=PRIVATE_TO_WRITE, exist_ok=True)
            if self.config.comm.trace_buf_size > 0:
                (self.path / self.config.comm.save_traces_folder).mkdir(exist_ok=True)
        (self.path / PENDING_NAME).unlink(missing_ok=True)
        # The status comes first because it marks the folder as a run's.
        self.set_status("running", self.decision.step)
        write_atomically(self.path / CONFIG_NAME, config_toml_text(self.config))
        copy_tokenizer(self.config.model.tokenizer_path, self.path / TOKENIZER_NAME)
        section, back_to = self.config.checkpoint, self.decision.load_step
        if self._uploads_steps and section.allow_rewind and back_to >= 0:
            forget_later(section, self.decision.run_id, back_to)
        self.start_uploads()

    def start_uploads(self) -> None:
        """Upload steps from now on if there is a remote folder; `step_saved` says when. Rank 0."""
        if self._uploads_steps:
            self.uploads = Uploads(self.config.checkpoint, self.path, self.decision.run_id)

    @property
    def _uploads_steps(self) -> bool:
        section = self.config.checkpoint
        return section.remote_folder is not None and section.enable and not section.load_only

    def step_saved(self) -> None:
        """Let the newest step be uploaded, if this process uploads."""
        if self.uploads is not None:
            self.uploads.step_saved()

    def keeps_status(self, error: BaseException) -> bool:
        """Return whether a start that ends with `error` leaves the stored status unchanged.

        It does if it was refused, or if the run had ended before, and nothing was written yet.
        """
        if self._has_begun:
            return False
        if self.decision.action == "new":
            return self.decision.replaces_run
        return self.decision.had_ended or isinstance(
            error, CheckpointError | ConfigError | DataError
        )

    def run_info(self, **extra: Any) -> dict[str, Any]:
        """Return what manifests keep about the run: run id, config, versions and `extra` (JSON)."""
        plain = json.loads(json.dumps(self.config.model_dump(exclude_none=True)))
        python = sys.version.split()[0]
        versions = {"python": python, "torch": version("torch"), "torchtitan": __version__}
        decision = self.decision
        kept = {"config": plain, "versions": versions, LOAD_STEP_NAME: decision.asked_load_step}
        return {"run_id": decision.run_id, **kept, **extra}

    def set_status(
        self,
        status: Status,
        step: int,
        exit_code: int | None = None,
        error: str = "",
        requeue: bool = False,
    ) -> None:
        """Write `run_status.json`. Rank 0 only; the status of a finished run is never changed.

        `error`: a line on why the run failed; `requeue`: the same command may well go on.
        """
        if self.decision.action != "finished":
            self._write_status(status, step, exit_code, error, requeue)

    def _settle(self) -> None:
        """Do for a finished run what its last start did not come to, because it was killed."""
        stored = StoredRun(self.path, self.config.checkpoint.folder)
        delete_leftovers(self.checkpoint_folder, self.decision.run_id)
        if stored.ended and stored.status.get("status") != stored.ended:
            self._write_status(stored.ended, stored.step, DONE)

    def _write_status(
        self, status: str, step: int, exit_code: int | None, error: str = "", requeue: bool = False
    ) -> None:
        content = {
            "status": status,
            "step": step,
            "run_id": self.decision.run_id,
            "exit_code": exit_code,
            "requeue": requeue,
            "error": error,
            "time": time.strftime("%Y-%m-%dT%H:%M:%S%z"),
        }
        path, text = self.path / STATUS_NAME, json.dumps(content, indent=1) + "\n"
        try:
            write_atomically(path, text)
        except OSError:
            # A scheduler must not take an ended job for a running one.
            if exit_code is None:
                raise
            write_in_place(path, text)

    def close(self) -> None:
        """Release the folder."""
        if self._lock is not None:
            self._lock.release()


def _lock(path: Path) -> FolderLock:
    try:
        path.mkdir(mode=PRIVATE_TO_WRITE, parents=True, exist_ok=True)
        return FolderLock(path)
    except FolderInUse as error:
        fix = "wait for that job or stop it, or choose another --job.dump_folder"
        raise ConfigError(ConfigIssue("job.dump_folder", str(error), fix, str(path))) from error
    except OSError as error:
        raise ConfigError(_unwritable(path, error)) from error


def _unwritable(path: Path, error: OSError) -> ConfigIssue:
    fix = "choose a folder that this user may write to"
    return ConfigIssue(
        "job.dump_folder", f"cannot be used: {error.strerror or error}", fix, str(path)
    )


def _move_run_aside(path: Path, config: JobConfig) -> None:
    """Move the files of a run into `previous-N/`; everything else stays."""
    stored = read_stored_config(path / CONFIG_NAME) or {}
    names = [STATUS_NAME, CONFIG_NAME, METRICS_NAME, RECORD_NAME, TOKENIZER_NAME, HF_NAME]
    for name in (METRICS_NAME, RECORD_NAME):
        names += [damaged.name for damaged in path.glob(f"{name}.damaged-*")]
    names += [REPORT_NAME, *_MORE_FOLDERS]
    for key in _FOLDER_KEYS:
        section, field = key.split(".")
        names += [
            str(stored_value(stored, key) or ""),
            str(getattr(getattr(config, section), field)),
        ]
    present = [
        name
        for name in dict.fromkeys(names)
        if name and os.path.basename(name) == name and os.path.lexists(path / name)
    ]
    number = 1
    while (path / f"previous-{number}").exists():
        number += 1
    target = path / f"previous-{number}"
    target.mkdir()
    # The status marks the folder as a run's and moves last: a crash in between leaves a run here.
    for name in sorted(present, key=lambda name: name == STATUS_NAME):
        os.rename(path / name, target / name)
    sync_folder(target)
    sync_folder(path)
