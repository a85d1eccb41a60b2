"""The run folder: who may use it, what it holds, and what a start in it does. No torch.

`job.dump_folder` belongs to one run. `config.toml` says which (the resolved config, from which it
can be trained again), `run_status.json` how it stands (for schedulers: torchrun turns every exit
status into 1), `.lock` whether a job is at work. A second start becomes one of three actions:

- "new": the folder held no run, or `job.new_run` moved it to `previous-N/`;
- "resume": it holds this run, unfinished or with `training.steps` raised;
- "finished": it holds this run, and there is nothing left to do.

Anything else is a `ConfigError`. Rank 0 opens the folder before any process group exists; the
others learn the outcome from `share`.
"""

import json
import os
import secrets
import sys
import time
from collections.abc import Mapping
from dataclasses import asdict, dataclass
from pathlib import Path
from typing import TYPE_CHECKING, Any, Literal

from torchtitan.checkpoint.checks import step_problems
from torchtitan.checkpoint.files import sync_folder, write_atomically
from torchtitan.checkpoint.lock import FolderInUse, FolderLock
from torchtitan.checkpoint.manifest import Manifest
from torchtitan.checkpoint.rerun import WAYS_OUT, compare, read_stored_config, stored_value
from torchtitan.checkpoint.steps_folder import inspect_steps, step_folders
from torchtitan.config import ConfigError, JobConfig, Problem
from torchtitan.config.facts import Facts
from torchtitan.config.toml_text import config_toml_text

if TYPE_CHECKING:
    from torchtitan.distributed.world import World

CONFIG_NAME = "config.toml"
STATUS_NAME = "run_status.json"
METRICS_NAME = "metrics.jsonl"

Action = Literal["new", "resume", "finished"]
Status = Literal["running", "completed", "preempted", "failed", "data_exhausted"]


@dataclass(frozen=True)
class Decision:
    """What a start in the folder does. `step` is the last one known to be done (0: none); the batch
    size and the lanes are resolved, the stored ones winning over open ones."""

    action: Action
    run_id: str
    step: int
    global_batch_size: int
    num_lanes: int
    notices: tuple[str, ...] = ()


@dataclass(frozen=True)
class _Stored:
    """What the folder says about the run in it."""

    status: dict[str, Any]
    config: dict[str, Any] | None
    good: list[Manifest]
    """Manifests of its whole checkpoints, by step."""
    step_folders: list[int]
    """Steps that have a folder, whole or not."""
    has_metrics: bool

    @property
    def is_run(self) -> bool:
        return bool(self.status or self.good)

    @property
    def newest(self) -> Manifest | None:
        return self.good[-1] if self.good else None

    @property
    def trained(self) -> bool:
        """Whether there is anything in it that a fresh start would lose."""
        return bool(self.step_folders or self.has_metrics or self.status.get("step"))

    @property
    def ended(self) -> str:
        """How the run ended by its own account, if it did: completed or data_exhausted."""
        status = str(self.status.get("status"))
        return status if status in ("completed", "data_exhausted") else ""

    @property
    def step(self) -> int:
        """The last step that a later start can count on."""
        step = self.status.get("step", 0) if self.ended else 0
        return max(step if isinstance(step, int) else 0, self.newest.step if self.newest else 0)


class RunFolder:
    """The opened folder of a run. `config` is the config with batch size and lanes resolved."""

    def __init__(self, path: Path, config: JobConfig, decision: Decision | None, lock: Any):
        self.path = path
        self.config = config
        self._decision = decision
        self._lock = lock

    @classmethod
    def open(cls, config: JobConfig, facts: Facts, is_main: bool = True) -> "RunFolder":
        """Lock the folder, decide, and put config and status in place. Rank 0 does; on other ranks
        nothing is touched and `share` must follow. Raises `ConfigError`, with the folder as it was.
        """
        path = Path(config.job.dump_folder).expanduser().resolve()
        if not is_main:
            return cls(path, config, None, None)
        lock = _lock(path)
        try:
            if config.job.new_run:
                _move_run_aside(path, config)
            decision = decide(config, facts, path)
            folder = cls(path, _resolved(config, decision), decision, lock)
            if decision.action != "finished":
                lock.name_run(decision.run_id)
                # The status first: it is what marks the folder as a run's.
                folder.set_status("running", decision.step)
                write_atomically(path / CONFIG_NAME, config_toml_text(folder.config))
        except OSError as error:
            lock.release()
            raise ConfigError(_unwritable(path, error)) from error
        except BaseException:
            lock.release()
            raise
        return folder

    @property
    def decision(self) -> Decision:
        """What this start does; on ranks other than 0 only after `share`."""
        assert self._decision is not None, "share() comes first on this rank"
        return self._decision

    @property
    def checkpoint_folder(self) -> Path:
        """Where the `step-N` folders are."""
        return self.path / self.config.checkpoint.folder

    def share(self, world: "World") -> Decision:
        """Rank 0's decision, and the config that follows from it. All ranks must call it."""
        sent = world.broadcast_json(asdict(self.decision) if world.is_main else None)
        self._decision = Decision(**{**sent, "notices": tuple(sent["notices"])})
        self.config = _resolved(self.config, self._decision)
        return self._decision

    def run_info(self, **facts: Any) -> dict[str, Any]:
        """What manifests keep about the run: run id, config, versions, and `facts` (JSON)."""
        plain = json.loads(json.dumps(self.config.model_dump(exclude_none=True)))
        versions = {"python": sys.version.split()[0], **_installed_versions()}
        return {"run_id": self.decision.run_id, "config": plain, "versions": versions, **facts}

    def set_status(self, status: Status, step: int, exit_code: int | None = None) -> None:
        """Say in `run_status.json` how the run stands. Rank 0 only. A run that was found finished
        stays finished, whatever happens to the process that found it so."""
        if self.decision.action == "finished":
            return
        content = {
            "status": status,
            "step": step,
            "run_id": self.decision.run_id,
            "exit_code": exit_code,
            "time": time.strftime("%Y-%m-%dT%H:%M:%S%z"),
        }
        write_atomically(self.path / STATUS_NAME, json.dumps(content, indent=1) + "\n")

    def close(self) -> None:
        """Let other jobs use the folder."""
        if self._lock is not None:
            self._lock.release()


def decide(config: JobConfig, facts: Facts, path: Path) -> Decision:
    """What a start with `config` in `path` does; only reads. Raises `ConfigError`."""
    stored = _read(path, config)
    if not stored.is_run:
        _refuse_foreign_config(path)
        return _decision("new", secrets.token_hex(6), 0, facts)
    newest_id = stored.newest.run_id if stored.newest else secrets.token_hex(6)
    run_id = str(stored.status.get("run_id") or newest_id)
    if not stored.trained:
        # The run died before it had done anything: its config may have been the reason.
        return _decision("new", run_id, 0, facts)
    if stored.config is None:
        text = f"holds a run, but its {CONFIG_NAME} cannot be read, so that nothing can be compared"
        fix = f"restore {CONFIG_NAME} in it, {WAYS_OUT}"
        raise ConfigError(Problem("job.dump_folder", text, fix, str(path)))
    problems, notices = compare(stored.config, config)
    if not problems:
        problems = _continuation_problems(config, stored, run_id, path / config.checkpoint.folder)
    if problems:
        raise ConfigError(problems)
    action, more = _action(config, stored)
    return _decision(action, run_id, stored.step, facts, stored.config, [*notices, *more])


def _action(config: JobConfig, stored: _Stored) -> tuple[Action, list[str]]:
    steps, checkpoint = config.training.steps, config.checkpoint
    if 0 <= checkpoint.load_step < stored.step and checkpoint.allow_rewind:
        return "resume", [f"Going back from step {stored.step} to step {checkpoint.load_step}."]
    if stored.ended == "data_exhausted":
        return "finished", [f"The run is finished: its data ended at step {stored.step}."]
    if stored.step >= steps:
        return "finished", [f"The run is finished: all {steps} steps are trained."]
    if not stored.good:
        return "resume", ["The run has no checkpoint yet: it starts again from step 0."]
    return "resume", []


def _continuation_problems(
    config: JobConfig, stored: _Stored, run_id: str, folder: Path
) -> list[Problem]:
    """Why this very run cannot go on as configured."""
    checkpoint, steps, newest = config.checkpoint, config.training.steps, stored.newest
    strangers = [manifest for manifest in stored.good if manifest.run_id != run_id]
    if strangers:
        text = f"holds step {strangers[0].step} of another run, {strangers[0].run_id}"
        fix = f"move that step away, {WAYS_OUT}"
        return [Problem("checkpoint.folder", text, fix, str(folder))]
    done = stored.ended == "data_exhausted" or stored.step >= steps
    if done and checkpoint.load_step < 0:
        return []
    if stored.step_folders and not checkpoint.enable:
        text = f"would start from step 0 again, but steps {stored.step_folders} are saved"
        return [Problem("checkpoint.enable", text, f"set it to true, {WAYS_OUT}", False)]
    if stored.ended and not stored.step_folders:
        text = f"the run is finished at step {stored.step}, and left no checkpoint to go on from"
        return [Problem("training.steps", text, f"set it back, {WAYS_OUT}", steps)]
    if checkpoint.load_step < 0 and newest is not None and newest.model_only:
        text = f"the checkpoint of step {newest.step} has no optimizer state to go on from"
        fix = (
            "choose an earlier one with checkpoint.load_step and checkpoint.allow_rewind, and set"
            f" checkpoint.last_save_model_only = false; {WAYS_OUT}"
        )
        return [Problem("training.steps", text, fix, steps)]
    return step_problems(checkpoint, folder)


def _read(path: Path, config: JobConfig) -> _Stored:
    stored_config = read_stored_config(path / CONFIG_NAME)
    try:
        status = json.loads((path / STATUS_NAME).read_text(encoding="utf-8"))
    except (OSError, ValueError):
        status = {}
    # The stored folder name: a config that renames it must not make the checkpoints disappear.
    name = stored_value(stored_config or {}, "checkpoint.folder") if status else None
    name = name if isinstance(name, str) else config.checkpoint.folder
    good = [candidate.manifest for candidate in inspect_steps(path / name) if candidate.manifest]
    if stored_config is None and good:
        kept = good[-1].info.get("config")
        stored_config = kept if isinstance(kept, dict) else None
    try:
        has_metrics = (path / METRICS_NAME).stat().st_size > 0
    except OSError:
        has_metrics = False
    status = status if isinstance(status, dict) else {}
    return _Stored(status, stored_config, good, step_folders(path / name), has_metrics)


def _decision(
    action: Action,
    run_id: str,
    step: int,
    facts: Facts,
    stored: Mapping[str, Any] | None = None,
    notices: list[str] | None = None,
) -> Decision:
    """Batch size and lanes: the stored ones, else what config and mesh say."""
    texts = list(notices or ())

    def resolve(key: str, now: int) -> int:
        before = stored_value(stored or {}, key)
        if not isinstance(before, int) or before <= 0:
            return now
        if before != now and action == "resume":
            texts.append(f"{key} stays {before}, as at the first start; it would be {now} here.")
        return before

    global_batch_size = resolve("training.global_batch_size", facts.global_batch_size)
    num_lanes = resolve("data.lanes", facts.num_lanes)
    return Decision(action, run_id, step, global_batch_size, num_lanes, tuple(texts))


def _resolved(config: JobConfig, decision: Decision) -> JobConfig:
    training = config.training.model_copy(update={"global_batch_size": decision.global_batch_size})
    # Kept, it would move this very run aside when somebody trains from its config.toml.
    job = config.job.model_copy(update={"new_run": False})
    data = config.data.model_copy(update={"lanes": decision.num_lanes})
    return config.model_copy(update={"job": job, "training": training, "data": data})


def _lock(path: Path) -> FolderLock:
    try:
        path.mkdir(parents=True, exist_ok=True)
        return FolderLock(path)
    except FolderInUse as error:
        fix = "wait for that job or stop it; or choose another --job.dump_folder"
        raise ConfigError(Problem("job.dump_folder", str(error), fix, str(path))) from error
    except OSError as error:
        raise ConfigError(_unwritable(path, error)) from error


def _unwritable(path: Path, error: OSError) -> Problem:
    fix = "choose a folder that this user may write to"
    return Problem("job.dump_folder", f"cannot be used: {error.strerror or error}", fix, str(path))


def _refuse_foreign_config(path: Path) -> None:
    """A `config.toml` that no run wrote is somebody's own file, not to be overwritten."""
    file = path / CONFIG_NAME
    if file.exists():
        text = f"holds a {CONFIG_NAME} that no run has written and that would be overwritten"
        fix = "choose another --job.dump_folder, or give that file another name"
        raise ConfigError(Problem("job.dump_folder", text, fix, str(path)))


def _move_run_aside(path: Path, config: JobConfig) -> None:
    """Move what a run of this library left into `previous-N/`; everything else stays."""
    stored = read_stored_config(path / CONFIG_NAME) or {}
    names = [STATUS_NAME, CONFIG_NAME, METRICS_NAME]
    for key in ("checkpoint.folder", "metrics.save_tb_folder", "profiling.save_traces_folder"):
        section, field = key.split(".")
        names += [
            str(stored_value(stored, key) or ""),
            str(getattr(getattr(config, section), field)),
        ]
    if not (path / STATUS_NAME).exists() and not step_folders(path / config.checkpoint.folder):
        return
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
    # The status marks the folder as a run's and goes last: a crash in between leaves a run here.
    for name in sorted(present, key=lambda name: name == STATUS_NAME):
        os.rename(path / name, target / name)
    sync_folder(target)
    sync_folder(path)


def _installed_versions() -> dict[str, str]:
    from importlib.metadata import PackageNotFoundError, version

    versions = {}
    for package in ("torch", "torchtitan"):
        try:
            versions[package] = version(package)
        except PackageNotFoundError:
            versions[package] = "unknown"
    return versions
