"""The inventory of a checkpoint folder: every step in it, and what is left of others. No torch."""

from collections.abc import Iterator
from contextlib import suppress
from dataclasses import dataclass
from pathlib import Path
from typing import Any

from torchtitan.checkpoint.config_diff import stored_value
from torchtitan.checkpoint.manifest import (
    MANIFEST_NAME,
    InvalidCheckpoint,
    Manifest,
    read_manifest,
)
from torchtitan.checkpoint.steps_folder import (
    inspect_step,
    leftovers,
    step_folders,
    step_name,
    steps_to_delete,
)
from torchtitan.checkpoint.stored_run import CONFIG_NAME, STATUS_NAME, StoredRun
from torchtitan.config import ConfigError, ConfigIssue


@dataclass(frozen=True)
class Entry:
    """One folder."""

    name: str
    state: str
    """`valid` (by names and sizes), `damaged`, `foreign` (another run's), `link`, or the kind of a
    `Leftover`."""
    step: int
    bytes: int
    time: float
    """Unix time at which it was committed, or last changed."""
    run_id: str | None = None
    tokens: int | None = None
    model_only: bool | None = None
    fault: str | None = None
    is_next: bool = False
    """The next start of the run takes it."""
    is_kept: bool | None = None
    """Retention keeps it; None for what it does not look at."""


@dataclass(frozen=True)
class Inventory:
    """The content of a run's checkpoint folder; entries by step, steps before leftovers."""

    run_folder: Path
    folder: Path
    run_id: str | None
    ended: str
    """`completed`, `data_exhausted` or an empty string."""
    keep_latest_k: int | None
    entries: list[Entry]

    @property
    def valid(self) -> list[int]:
        """The valid steps of the run, ascending."""
        return [entry.step for entry in self.entries if entry.state == "valid"]


def take_inventory(given: Path) -> Inventory:
    """Look at the run's folder, or folder of checkpoints, `given`; tensors are not read.

    Raises ConfigError if it is neither.
    """
    run_folder, stored = _run_of(given)
    folder = stored.checkpoints
    newest_id = stored.newest.run_id if stored.newest else None
    run_id = stored.status.get("run_id") or newest_id
    keep = stored_value(stored.config or {}, "checkpoint.keep_latest_k")
    keep = keep if isinstance(keep, int) else None
    valid = [found.step for found in stored.good if found.run_id == run_id]
    # A start refuses a folder with another run's steps, or with links.
    takes_newest = len(valid) == len(stored.good) and not any(_links(folder))
    doomed = steps_to_delete(valid, valid[-1], keep or 0, ()) if valid else []
    entries = [*_links(folder)]
    for step in stored.step_folders:
        found, path = inspect_step(folder, step), folder / step_name(step)
        if found.manifest is None:
            entries += _entry(path, "damaged", step, None, fault=found.fault)
        elif found.manifest.run_id != run_id:
            entries += _entry(path, "foreign", step, found.manifest)
        else:
            is_next, is_kept = takes_newest and step == valid[-1], step not in doomed
            entries += _entry(path, "valid", step, found.manifest, is_next=is_next, is_kept=is_kept)
    entries.sort(key=lambda entry: entry.step)
    for each in leftovers(folder):
        try:
            entries += _entry(each.path, each.kind, each.step, read_manifest(each.path))
        except InvalidCheckpoint:
            entries += _entry(each.path, each.kind, each.step, None, run_id=each.run_id)
    return Inventory(run_folder, folder, run_id, stored.ended, keep, entries)


def _run_of(given: Path) -> tuple[Path, StoredRun]:
    """Return the folder of the run, which its jobs lock, and what it holds."""
    given = given.resolve()
    if any((given / name).exists() for name in (STATUS_NAME, CONFIG_NAME)):
        return given, StoredRun(given, "checkpoint")
    if step_folders(given) or leftovers(given):
        stored = StoredRun(given.parent, given.name)
        # A folder that is not that run's is a copy: only its manifests tell of the run.
        return given.parent, stored if stored.checkpoints == given else StoredRun(given, ".")
    if (given / "checkpoint").is_dir():
        return given, StoredRun(given, "checkpoint")
    fix = "name a run's folder (job.dump_folder), or its folder of checkpoints"
    raise ConfigError(ConfigIssue("RUN", "holds no checkpoints", fix, str(given)))


def _links(folder: Path) -> Iterator[Entry]:
    for path in sorted(folder.glob("step-*")):
        step = path.name.removeprefix("step-")
        if path.is_symlink() and step.isdecimal():
            fault = f"{path}: is a link, which is never loaded"
            yield Entry(path.name, "link", int(step), 0, path.lstat().st_mtime, fault=fault)


def _entry(
    path: Path, state: str, step: int, manifest: Manifest | None, **more: Any
) -> Iterator[Entry]:
    """Yield the entry of a folder; none if a running job has just renamed or deleted it."""
    if manifest is not None:
        more["run_id"], more["model_only"] = manifest.run_id, manifest.model_only
        more["tokens"] = manifest.state.get("num_tokens_seen")
    with suppress(FileNotFoundError):
        size = sum(entry.lstat().st_size for entry in path.iterdir())
        committed = path / MANIFEST_NAME
        changed = (committed if committed.exists() else path).stat().st_mtime
        yield Entry(path.name, state, step, size, changed, **more)
