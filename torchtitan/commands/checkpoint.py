"""`torchtitan checkpoint ls|verify|diff|prune`: look after the checkpoints of a run.

Only `verify` without --quick, `diff` and a `prune` that deletes import torch.
"""

import argparse
import json
import os
import shutil
import sys
import time
from collections.abc import Callable, Mapping
from dataclasses import asdict
from pathlib import Path
from typing import Any

from torchtitan.checkpoint.inventory import Entry, Inventory, take_inventory
from torchtitan.checkpoint.lock import FolderInUse, FolderLock
from torchtitan.checkpoint.manifest import (
    MANIFEST_NAME,
    InvalidCheckpoint,
    Manifest,
    check_listing,
    damaged_files,
    read_manifest,
)
from torchtitan.checkpoint.steps_folder import delete_step, inspect_step, step_name, steps_to_delete
from torchtitan.commands import inspect
from torchtitan.commands.printing import Progress, aligned
from torchtitan.config.errors import CheckpointError, ConfigError, ConfigIssue
from torchtitan.config.exit_codes import CHECKPOINT, DONE
from torchtitan.config.paths import expand_path
from torchtitan.utils.text import format_bytes, plural

_STEPS = ("valid", "damaged", "foreign", "link")
"""States of what is named `step-N`."""


def run(options: argparse.Namespace) -> int:
    """Run the action and return the exit status."""
    actions: dict[str, Callable[[argparse.Namespace], int]] = {
        "ls": _ls,
        "verify": _verify,
        "diff": inspect.run,
        "prune": _prune,
    }
    return actions[options.action](options)


def _show(report: Mapping[str, Any], lines: list[str], as_json: bool) -> None:
    print(json.dumps(report, ensure_ascii=False) if as_json else "\n".join(lines))


# --- ls -------------------------------------------------------------------------------------------


def _ls(options: argparse.Namespace) -> int:
    found = take_inventory(Path(expand_path(options.run)))
    report = asdict(found) | {"run_folder": str(found.run_folder), "folder": str(found.folder)}
    _show(report, _listing(found), options.json)
    return DONE


def _listing(found: Inventory) -> list[str]:
    head = f"{found.folder}: run {found.run_id or 'unknown'}"
    head += f", {found.ended}" if found.ended else ""
    if found.keep_latest_k is not None:
        head += f"; checkpoint.keep_latest_k = {found.keep_latest_k}"
    if not found.entries:
        return [head, "no checkpoints yet"]
    rows = [("name", "state", "size", "saved", "tokens", "holds", "")]
    for entry in found.entries:
        saved = time.strftime("%Y-%m-%d %H:%M", time.localtime(entry.time))
        tokens = "" if entry.tokens is None else f"{entry.tokens:,}"
        holds = {None: "", True: "model", False: "all"}[entry.model_only]
        note = _note(entry, found)
        rows.append(
            (entry.name, entry.state, format_bytes(entry.bytes), saved, tokens, holds, note)
        )
    total = format_bytes(sum(entry.bytes for entry in found.entries))
    return [head, *aligned(rows), f"{total} in all"]


def _note(entry: Entry, found: Inventory) -> str:
    if entry.fault is not None:
        return entry.fault.removeprefix(f"{found.folder}/")
    if entry.state == "foreign":
        return f"of run {entry.run_id}: a start is refused"
    if entry.is_kept is False:
        return "more than keep_latest_k"
    return "the next start takes it" if entry.is_next else ""


# --- verify ---------------------------------------------------------------------------------------


def _verify(options: argparse.Namespace) -> int:
    faults = _faults(_steps_of(Path(expand_path(options.checkpoint)).resolve()), options.quick)
    how = "by names and sizes" if options.quick else "every byte read"
    lines = [
        f"{path.name}: {'damaged; no start loads it' if texts else f'good, {how}'}"
        for path, texts in faults.items()
    ]
    steps = [{"path": str(path), "faults": texts} for path, texts in faults.items()]
    damaged = [text for texts in faults.values() for text in texts]
    _show({"steps": steps, "quick": options.quick}, lines, options.json)
    for text in damaged:
        print(f"damaged: {text}", file=sys.stderr)
    return CHECKPOINT if damaged else DONE


def _steps_of(given: Path) -> list[Path]:
    """Return the step `given`, or all of the run in it."""
    if os.path.lexists(given / MANIFEST_NAME) or (_number_of(given) is not None and given.is_dir()):
        return [given]
    found = take_inventory(given)
    steps = [found.folder / entry.name for entry in found.entries if entry.state in _STEPS]
    if not steps:
        fix = "name a step, or the folder of a run that has saved one"
        raise ConfigError(ConfigIssue("CHECKPOINT", "holds no step", fix, str(given)))
    return steps


def _faults(steps: list[Path], quick: bool = False) -> dict[Path, list[str]]:
    """Return what a start would find wrong with each step."""
    faults: dict[Path, list[str]] = {path: [] for path in steps}
    manifests: dict[Path, Manifest] = {}
    for path in steps:
        try:
            manifests[path] = _listed(path)
        except InvalidCheckpoint as error:
            faults[path].append(str(error))
    if quick:
        return faults
    from torchtitan.checkpoint.dcp_io import check_metadata

    files = {p / name: record for p, m in manifests.items() for name, record in m.files.items()}
    progress = Progress("verifying", sum(manifest.num_bytes for manifest in manifests.values()))
    for file, text in damaged_files(files, progress.add).items():
        faults[file.parent].append(text)
    for path, manifest in manifests.items():
        try:
            if not faults[path]:
                check_metadata(path, manifest)
        except InvalidCheckpoint as error:
            faults[path].append(str(error))
    return faults


def _listed(path: Path) -> Manifest:
    """Return the manifest of a step that has the right names and sizes, and is no link."""
    number = _number_of(path)
    if path.is_symlink():
        raise InvalidCheckpoint(f"{path}: is a link, which is never loaded")
    if number is not None:
        found = inspect_step(path.parent, number)
        if found.manifest is None:
            raise InvalidCheckpoint(found.fault)
        return found.manifest
    manifest = read_manifest(path)  # quarantined, or copied to another name
    check_listing(path, manifest)
    return manifest


def _number_of(path: Path) -> int | None:
    number = path.name.removeprefix("step-")
    is_step = number.isdecimal() and path.name == step_name(int(number))
    return int(number) if is_step else None


# --- prune ----------------------------------------------------------------------------------------


def _prune(options: argparse.Namespace) -> int:
    if options.keep is None and not options.steps and not options.leftovers:
        fix = "add --keep K, --step N or --leftovers"
        raise ConfigError(ConfigIssue("checkpoint prune", "is not told what to delete", fix))
    given = Path(expand_path(options.run))
    found = take_inventory(given)
    lock = None if options.dry_run else _lock(found)
    try:
        found = take_inventory(given)  # nobody changes it from here on
        doomed = _doomed(found, options)
        if lock is not None:
            _delete(found, doomed)
    finally:
        if lock is not None:
            lock.release()
    freed = sum(entry.bytes for entry in doomed)
    what = "would be deleted" if options.dry_run else "deleted"
    lines = [f"{entry.name}: {what}, {format_bytes(entry.bytes)}" for entry in doomed]
    kept = [step for step in found.valid if step_name(step) not in {each.name for each in doomed}]
    total = f"{plural(len(doomed), 'folder')}, {format_bytes(freed)}, {what}"
    lines.append(f"{total}; valid steps that stay: {', '.join(map(str, kept)) or 'none'}")
    report = {"deleted": [entry.name for entry in doomed], "bytes": freed, "kept": kept}
    _show(report | {"dry_run": options.dry_run}, lines, options.json)
    return DONE


def _lock(found: Inventory) -> FolderLock:
    try:
        return FolderLock(found.run_folder, found.run_id or "")
    except FolderInUse as error:
        text, fix = str(error), "wait for that job or stop it; its own saves delete old steps"
    except OSError as error:
        text, fix = f"cannot be locked: {error.strerror or error}", "run it as the user of the run"
    raise ConfigError(ConfigIssue("RUN", text, fix, str(found.run_folder)))


def _doomed(found: Inventory, options: argparse.Namespace) -> list[Entry]:
    """Return what to delete, oldest first. Raises ConfigError for a step that has to stay."""
    valid, steps = found.valid, set(options.steps)
    problems = []
    for step in sorted(steps):
        if step not in valid:
            text, fix = "is no valid step of this run", f"choose from {valid}"
            problems.append(ConfigIssue("--step", text, fix, step))
        elif step == valid[-1]:
            text, fix = "is the newest valid step", "delete the whole run, or keep it"
            problems.append(ConfigIssue("--step", text, fix, step))
    if problems:
        raise ConfigError(problems)
    if options.keep is not None and valid:
        steps |= set(steps_to_delete(valid, valid[-1], options.keep, ()))
    return [
        entry
        for entry in found.entries
        if (entry.state == "valid" and entry.step in steps)
        or (
            options.leftovers and entry.state not in _STEPS and entry.run_id in (None, found.run_id)
        )
    ]


def _delete(found: Inventory, doomed: list[Entry]) -> None:
    """Delete what is doomed. Raises CheckpointError if the newest step is damaged, or undeletable.

    Damage that sizes do not show would otherwise cost the step to fall back to.
    """
    if any(entry.state == "valid" for entry in doomed):
        newest = found.folder / step_name(found.valid[-1])
        if faults := _faults([newest])[newest]:
            raise CheckpointError(f"nothing was deleted, as {'; '.join(faults)}")
    for entry in doomed:
        path = found.folder / entry.name
        try:
            if entry.state == "valid":
                delete_step(found.folder, str(found.run_id), entry.step)
            else:
                shutil.rmtree(path)
        except OSError as error:
            raise CheckpointError(f"{path} cannot be deleted: {error}") from error
