"""The folder of checkpoints: which steps it holds, what is kept, what is moved aside. No torch.

A checkpoint is a real directory named exactly `step-N` that holds a readable manifest. Everything
else is left alone: stray names are never read, counted or deleted. Names of our own making are
`.tmp-step-N-...` (being written), `.trash-step-N-...` (being deleted), `quarantine-step-N-...`
(found damaged) and `rewound-step-N-...` (newer than the step a run was sent back to); the last two
stay until somebody removes them.
"""

import os
import re
import secrets
import shutil
from dataclasses import dataclass
from pathlib import Path

from torchtitan.checkpoint.files import (
    replaceable_by_anybody,
    sync_folder,
    writable_by_anybody,
)
from torchtitan.checkpoint.manifest import (
    MANIFEST_NAME,
    InvalidCheckpoint,
    Manifest,
    check_listing,
    read_manifest,
)

_STEP_NAME = re.compile(r"step-(0|[1-9][0-9]{0,18})", re.ASCII)


@dataclass(frozen=True)
class Candidate:
    """A `step-N` folder: its manifest when it has a good one and all listed files with their sizes,
    else why not. File contents have not been read."""

    step: int
    manifest: Manifest | None
    fault: str | None


def step_name(step: int) -> str:
    """Folder name of a step."""
    return f"step-{step}"


def step_folders(folder: Path) -> list[int]:
    """Steps that have a folder, good or not, in ascending order. Links do not count."""
    try:
        entries = list(os.scandir(folder))
    except (FileNotFoundError, NotADirectoryError):
        return []
    return sorted(
        int(entry.name.removeprefix("step-"))
        for entry in entries
        if _STEP_NAME.fullmatch(entry.name) and entry.is_dir(follow_symlinks=False)
    )


def inspect_step(folder: Path, step: int) -> Candidate:
    """What can be said about a step without reading its tensors."""
    path = folder / step_name(step)
    try:
        manifest = read_manifest(path)
        if manifest.step != step:
            raise InvalidCheckpoint(f"{path}: its manifest is that of step {manifest.step}")
        check_listing(path, manifest)
    except InvalidCheckpoint as error:
        return Candidate(step, None, str(error))
    return Candidate(step, manifest, None)


def inspect_steps(folder: Path) -> list[Candidate]:
    """`inspect_step` of every step, in ascending order."""
    return [inspect_step(folder, step) for step in step_folders(folder)]


def committed_steps(folder: Path, run_id: str) -> list[int]:
    """Steps of a run that were committed and are still whole by name and size, ascending."""
    return [
        candidate.step
        for candidate in inspect_steps(folder)
        if candidate.manifest is not None and candidate.manifest.run_id == run_id
    ]


def unprotected_parts(folder: Path) -> list[Path]:
    """Return what anybody on the machine may write to of the run folder, `folder` in it, its steps
    and their manifests. Whoever may write to one of them can plant a checkpoint."""
    steps = [folder / step_name(step) for step in step_folders(folder)]
    parts = [folder, *steps, *(step / MANIFEST_NAME for step in steps)]
    found = [part for part in parts if part.exists() and writable_by_anybody(part)]
    run = folder.parent
    return [run, *found] if run.exists() and replaceable_by_anybody(run) else found


def temporary_name(step: int, run_id: str) -> str:
    """A fresh name for a checkpoint that is being written."""
    return f".tmp-step-{step}-{run_id}-{secrets.token_hex(4)}"


def move_aside(folder: Path, step: int, prefix: str) -> Path:
    """Rename a step so that it is a step no more; returns where it is now."""
    target = folder / f"{prefix}-step-{step}-{secrets.token_hex(4)}"
    os.rename(folder / step_name(step), target)
    sync_folder(folder)
    return target


def steps_to_delete(steps: list[int], current: int, keep_latest: int, protected: int) -> list[int]:
    """Steps that retention removes after `current` was committed.

    Of the steps up to `current` the newest `keep_latest` stay (0: all), and `protected`, the step
    that the run was resumed from. Steps after `current` are somebody's future: neither counted nor
    removed.
    """
    if keep_latest == 0:
        return []
    past = sorted(step for step in steps if step <= current)
    return [step for step in past[:-keep_latest] if step not in (protected, current)]


def delete_old_steps(
    folder: Path, run_id: str, current: int, keep_latest: int, protected: int
) -> list[int]:
    """Apply `steps_to_delete` to the committed steps of this run; returns what was removed.

    A step first loses its name, so that a crash in the middle leaves no half a checkpoint behind.
    """
    device = os.stat(folder).st_dev
    steps = committed_steps(folder, run_id)
    doomed = steps_to_delete(steps, current, keep_latest, protected)
    for step in doomed:
        path = folder / step_name(step)
        if os.lstat(path).st_dev != device:
            continue
        shutil.rmtree(move_aside(folder, step, f".trash-{run_id}"))
    return doomed


def delete_leftovers(folder: Path, run_id: str) -> list[str]:
    """Remove what a killed process of this run was writing or deleting; returns the names.

    The caller holds the run folder's lock, so that no living process owns them.
    """
    run = re.escape(run_id)
    patterns = (rf"\.tmp-step-\d+-{run}-[0-9a-f]+", rf"\.trash-{run}-step-\d+-[0-9a-f]+")
    removed = []
    for entry in os.scandir(folder) if folder.is_dir() else ():
        ours = any(re.fullmatch(pattern, entry.name) for pattern in patterns)
        if ours and entry.is_dir(follow_symlinks=False):
            shutil.rmtree(entry.path)
            removed.append(entry.name)
    return removed
