"""The checkpoint folder: its steps, retention, and steps that are moved aside. No torch.

A checkpoint is a real directory named exactly `step-N` that holds a readable manifest. Other names
are never read, counted or deleted, except `.tmp-step-N-...` (being written) and `.trash-...` (being
deleted). `quarantine-step-N-...` (damaged) and `rewound-step-N-...` (later than the step that a run
went back to) stay until a user removes them.
"""

import logging
import os
import re
import secrets
import shutil
from collections.abc import Collection, Iterable
from dataclasses import dataclass
from pathlib import Path

from torchtitan.checkpoint.files import replaceable_by_anybody, writable_by_anybody
from torchtitan.checkpoint.manifest import (
    MANIFEST_NAME,
    InvalidCheckpoint,
    Manifest,
    check_listing,
    read_manifest,
)
from torchtitan.config import ConfigIssue
from torchtitan.config.schema import Checkpoint
from torchtitan.utils.files import sync_folder

logger = logging.getLogger(__name__)

_STEP_NAME = re.compile(r"step-(0|[1-9][0-9]{0,18})", re.ASCII)
_LEFTOVER_NAMES = {
    "temporary": re.compile(r"\.tmp-step-(?P<step>\d+)-(?P<run>.+)-[0-9a-f]+"),
    "trash": re.compile(r"\.trash-(?P<run>.+)-step-(?P<step>\d+)-[0-9a-f]+"),
    "quarantined": re.compile(r"quarantine-step-(?P<step>\d+)-[0-9a-f]+"),
    "rewound": re.compile(r"rewound-step-(?P<step>\d+)-[0-9a-f]+"),
}


@dataclass(frozen=True)
class Candidate:
    """A `step-N` folder: its manifest if names and sizes match it, else the fault."""

    step: int
    manifest: Manifest | None
    fault: str | None


@dataclass(frozen=True)
class Leftover:
    """A folder that was a step or was to be one; its name tells the run only while it is hidden."""

    path: Path
    kind: str
    """`temporary`, `trash`, `quarantined` or `rewound`."""
    step: int
    run_id: str | None


def step_name(step: int) -> str:
    """Return the folder name of a step."""
    return f"step-{step}"


def step_folders(folder: Path) -> list[int]:
    """Return the steps that have a folder, valid or not, ascending; links do not count."""
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
    """Check a step without reading its tensors."""
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
    """Return `inspect_step` of every step, ascending."""
    return [inspect_step(folder, step) for step in step_folders(folder)]


def committed_steps(folder: Path, run_id: str) -> list[int]:
    """Return the committed steps of a run that match their manifests in size, ascending."""
    return [
        candidate.step
        for candidate in inspect_steps(folder)
        if candidate.manifest is not None and candidate.manifest.run_id == run_id
    ]


def step_problems(section: Checkpoint, folder: Path) -> list[ConfigIssue]:
    """Return why a run cannot continue from `folder` as configured.

    Only names, manifests and sizes are read; contents are verified when a checkpoint is loaded.
    """
    if not section.enable:
        return []
    links = sorted(path.name for path in folder.glob("step-*") if path.is_symlink())
    if links:
        text = f"holds {links[0]}, which is a link and therefore never loaded"
        fix = "put a real folder in its place, or remove it"
        return [ConfigIssue("checkpoint.folder", text, fix, section.folder)]
    candidates = inspect_steps(folder)
    if section.load_step >= 0:
        return _load_step_problems(section, candidates)
    if candidates and not any(candidate.manifest for candidate in candidates):
        steps = _join(candidate.step for candidate in candidates)
        faults = "; ".join(candidate.fault or "" for candidate in candidates[-3:])
        text = f"holds steps {steps}, none of which is a valid checkpoint ({faults})"
        fix = "restore one, or start anew in another --job.dump_folder or with --job.new_run"
        return [ConfigIssue("checkpoint.folder", text, fix, section.folder)]
    return []


def _load_step_problems(section: Checkpoint, candidates: list[Candidate]) -> list[ConfigIssue]:
    key, step = "checkpoint.load_step", section.load_step
    good = _join(candidate.step for candidate in candidates if candidate.manifest)
    asked = [candidate for candidate in candidates if candidate.step == step]
    if not asked:
        text = f"is not among the saved steps: {good or 'there are none'}"
        return [ConfigIssue(key, text, "choose one of them, or -1 for the newest", step)]
    if asked[0].fault is not None:
        fix = f"choose another ({good or 'there is none'}), or -1 for the newest good one"
        return [ConfigIssue(key, f"is damaged ({asked[0].fault})", fix, step)]
    later = _join(candidate.step for candidate in candidates if candidate.step > step)
    if later and not section.allow_rewind:
        text = f"is older than steps {later}, which are invalid once the run goes back"
        fix = "set checkpoint.allow_rewind to move them aside, or use another --job.dump_folder"
        return [ConfigIssue(key, text, fix, step)]
    return []


def _join(steps: Iterable[int]) -> str:
    return ", ".join(map(str, steps))


def unprotected_parts(folder: Path) -> list[Path]:
    """Return the run folder, `folder` in it, steps and manifests that all users may write to.

    Whoever may write to one of them can plant a checkpoint.
    """
    steps = [folder / step_name(step) for step in step_folders(folder)]
    parts = [folder, *steps, *(step / MANIFEST_NAME for step in steps)]
    found = [part for part in parts if part.exists() and writable_by_anybody(part)]
    run = folder.parent
    return [run, *found] if run.exists() and replaceable_by_anybody(run) else found


def temporary_name(step: int, run_id: str) -> str:
    """Return a fresh name for a checkpoint that is being written."""
    return f".tmp-step-{step}-{run_id}-{secrets.token_hex(4)}"


def move_aside(folder: Path, step: int, prefix: str) -> Path:
    """Rename a step so that it no longer counts as one; return its new path."""
    target = folder / f"{prefix}-step-{step}-{secrets.token_hex(4)}"
    os.rename(folder / step_name(step), target)
    sync_folder(folder)
    return target


def steps_to_delete(
    steps: list[int], current: int, keep_latest: int, protected: Collection[int]
) -> list[int]:
    """Return the steps that retention removes after `current` was committed.

    The newest `keep_latest` steps up to `current` stay (0: all), and so do `protected` ones. Steps
    after `current` are neither counted nor removed.
    """
    if keep_latest == 0:
        return []
    past = sorted(step for step in steps if step <= current)
    return [step for step in past[:-keep_latest] if step not in (*protected, current)]


def delete_old_steps(
    folder: Path, run_id: str, current: int, keep_latest: int, protected: Collection[int]
) -> list[int]:
    """Apply `steps_to_delete` to the committed steps of this run; return the removed ones."""
    steps = committed_steps(folder, run_id)
    doomed = steps_to_delete(steps, current, keep_latest, protected)
    for step in doomed:
        delete_step(folder, run_id, step)
    return doomed


def delete_step(folder: Path, run_id: str, step: int) -> None:
    """Delete a step of this run, unless another file system is mounted there.

    It is renamed first, so that a crash in the middle leaves no half checkpoint.
    """
    if os.lstat(folder / step_name(step)).st_dev == os.stat(folder).st_dev:
        shutil.rmtree(move_aside(folder, step, f".trash-{run_id}"))


def leftovers(folder: Path) -> list[Leftover]:
    """Return what is left of steps that were written, deleted or moved aside, by step."""
    found = []
    for entry in os.scandir(folder) if folder.is_dir() else ():
        for kind, pattern in _LEFTOVER_NAMES.items():
            match = pattern.fullmatch(entry.name)
            if match and entry.is_dir(follow_symlinks=False):
                run = match.groupdict().get("run")
                found.append(Leftover(Path(entry.path), kind, int(match["step"]), run))
    return sorted(found, key=lambda each: (each.step, each.path.name))


def delete_leftovers(folder: Path, run_id: str) -> list[str]:
    """Remove what a killed process of this run was writing or deleting; return the names.

    The caller holds the lock of the run folder, so no living process owns them.
    """
    ours = [each.path for each in leftovers(folder) if each.run_id == run_id]
    for path in ours:
        shutil.rmtree(path)
    return [path.name for path in ours]


def quarantine(folder: Path, step: int, fault: str) -> None:
    """Move a damaged step aside, and log its fault."""
    try:
        moved = str(move_aside(folder, step, "quarantine"))
    except OSError as error:
        moved = f"where it was, because it cannot be moved ({error})"
    logger.error("CHECKPOINT DAMAGED: %s. Step %d is now %s.", fault, step, moved)
