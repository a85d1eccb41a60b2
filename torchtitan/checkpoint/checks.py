"""What can be said against the checkpoint settings, before torch is imported."""

import os
import re
import shutil
from pathlib import Path

from torchtitan.checkpoint.steps_folder import inspect_step, inspect_steps, step_folders
from torchtitan.config import Problem
from torchtitan.config.facts import Facts
from torchtitan.config.output_sections import Checkpoint

_NAME = re.compile(r"(?!\.)[A-Za-z0-9._-]{1,128}", re.ASCII)
_TAKEN = re.compile(r"config\.toml|run_status\.json|metrics\.jsonl|previous-[0-9]+")
_LONG_RUN_STEPS = 1000
SPACE_FACTOR = 1.2


def check(facts: Facts) -> list[Problem]:
    """Problems of the section alone and with the other sections. Touches no file."""
    config, section = facts.config, facts.config.checkpoint
    problems = []
    if not _NAME.fullmatch(section.folder) or ".." in section.folder:
        text = "is not a plain name: letters, digits, `.`, `_`, `-`, no leading dot, no `..`"
        fix = 'use a name such as "checkpoint"; job.dump_folder says where it lies'
        problems.append(Problem("checkpoint.folder", text, fix, section.folder))
    others = (config.metrics.save_tb_folder, config.profiling.save_traces_folder)
    if section.folder in others or _TAKEN.fullmatch(section.folder):
        text = "is the name of something else in the run folder"
        fix = 'choose a name of its own, such as "checkpoint"'
        problems.append(Problem("checkpoint.folder", text, fix, section.folder))
    if section.keep_latest_k == 1:
        text = "would leave nothing to fall back to when the only checkpoint is damaged"
        problems.append(Problem("checkpoint.keep_latest_k", text, "use 2 or more, or 0 for all", 1))
    return problems + _switch_problems(facts)


def probe(facts: Facts) -> list[Problem]:
    """Problems of the run folder as it is now; reads names and manifests, writes nothing."""
    section = facts.config.checkpoint
    dump_folder = Path(facts.config.job.dump_folder).expanduser()
    problems = _folder_problems(dump_folder)
    if problems or not section.enable or facts.config.job.new_run:
        return problems
    folder = dump_folder.resolve() / section.folder
    if _on_memory(folder):
        text = "is in memory (tmpfs): checkpoints there are lost when the machine stops"
        fix = "put job.dump_folder on a disk"
        problems.append(Problem("job.dump_folder", text, fix, str(dump_folder), severity="warning"))
    if folder.is_dir() and folder.stat().st_mode & 0o002 and not section.trust_path:
        text = "may be written to by anybody on this machine, who could plant a checkpoint"
        fix = "`chmod o-w` it, or set checkpoint.trust_path"
        problems.append(Problem("checkpoint.folder", text, fix, str(folder)))
    return problems + step_problems(section, folder) + _space_problems(folder)


def step_problems(section: Checkpoint, folder: Path) -> list[Problem]:
    """Why no checkpoint of `folder` can be continued from as `section` asks. Only names, manifests
    and sizes are read; contents are verified when a checkpoint is loaded."""
    if not section.enable:
        return []
    links = sorted(path.name for path in folder.glob("step-*") if path.is_symlink())
    if links:
        text = f"holds {links[0]}, which is a link, and is ignored where checkpoints are sought"
        fix = "put a real folder in its place, or remove it"
        return [Problem("checkpoint.folder", text, fix, section.folder)]
    steps = step_folders(folder)
    if section.load_step >= 0:
        return _load_step_problems(section, folder, steps)
    candidates = inspect_steps(folder)
    if candidates and not any(candidate.manifest for candidate in candidates):
        faults = "; ".join(candidate.fault or "" for candidate in candidates[-3:])
        text = f"holds steps {_join(steps)}, none of which is a whole checkpoint ({faults})"
        fix = (
            "restore one of them; or start anew in another --job.dump_folder or with --job.new_run"
        )
        return [Problem("checkpoint.folder", text, fix, section.folder)]
    return []


def _load_step_problems(section: Checkpoint, folder: Path, steps: list[int]) -> list[Problem]:
    step = section.load_step
    good = [candidate.step for candidate in inspect_steps(folder) if candidate.manifest]
    if step not in steps:
        text = f"is not among the saved steps: {_join(good) or 'there are none'}"
        fix = "choose one of them, or -1 for the newest"
        return [Problem("checkpoint.load_step", text, fix, step)]
    fault = inspect_step(folder, step).fault
    if fault is not None:
        fix = f"choose another ({_join(good) or 'there is none'}), or -1 for the newest good one"
        return [Problem("checkpoint.load_step", f"is damaged ({fault})", fix, step)]
    later = [other for other in steps if other > step]
    if later and not section.allow_rewind:
        text = f"is older than steps {_join(later)}, which going on from it would make invalid"
        fix = (
            "set checkpoint.allow_rewind, which moves them aside; or train in another"
            " --job.dump_folder"
        )
        return [Problem("checkpoint.load_step", text, fix, step)]
    return []


def _switch_problems(facts: Facts) -> list[Problem]:
    section, steps = facts.config.checkpoint, facts.config.training.steps
    if section.enable:
        if section.interval <= steps or steps <= _LONG_RUN_STEPS:
            return []
        text = f"is more than training.steps = {steps}: only the last step will be saved"
        fix = "set it to less, so that a stopped run can be resumed"
        return [Problem("checkpoint.interval", text, fix, section.interval, severity="warning")]
    if section.load_step >= 0:
        text = "has no effect, because checkpoint.enable is false"
        return [Problem("checkpoint.load_step", text, "set checkpoint.enable", section.load_step)]
    if steps > _LONG_RUN_STEPS:
        text = f"means that a run of {steps} steps cannot be resumed when it is stopped"
        fix = "set it to true"
        return [Problem("checkpoint.enable", text, fix, False, severity="warning")]
    return []


def _folder_problems(dump_folder: Path) -> list[Problem]:
    existing = dump_folder.absolute()
    try:
        while not existing.exists() and existing != existing.parent:
            existing = existing.parent
    except OSError as error:
        text = f"cannot be used: {error.strerror or error}"
        return [Problem("job.dump_folder", text, "choose another path", str(dump_folder))]
    fix = "choose a folder that this user may write to"
    if not existing.is_dir():
        text = f"{existing} is a file" if existing != dump_folder.absolute() else "is a file"
        return [Problem("job.dump_folder", text, fix, str(dump_folder))]
    if not os.access(existing, os.W_OK | os.X_OK):
        text = f"cannot be written: no permission for {existing}"
        return [Problem("job.dump_folder", text, fix, str(dump_folder), missing_asset=True)]
    return []


def _space_problems(folder: Path) -> list[Problem]:
    """A resumed run knows how large its checkpoints are."""
    sizes = [c.manifest.num_bytes for c in inspect_steps(folder) if c.manifest]
    if not sizes:
        return []
    needed, free = SPACE_FACTOR * sizes[-1], shutil.disk_usage(folder).free
    if free >= needed:
        return []
    return [space_problem(folder, needed, free)]


def space_problem(folder: Path, needed: float, free: float) -> Problem:
    """That `folder` has too little space for the next checkpoint (bytes)."""
    text = (
        f"needs {needed / 2**30:.2f} GiB for the next checkpoint, {free / 2**30:.2f} GiB are free"
    )
    fix = "free some space, or put job.dump_folder on a larger disk"
    return Problem("checkpoint.folder", text, fix, str(folder))


def _on_memory(folder: Path) -> bool:
    """Whether a path lies on a file system in memory, as far as the kernel tells."""
    try:
        mounts = [line.split() for line in Path("/proc/mounts").read_text().splitlines()]
    except OSError:
        return False
    text, best = str(folder), ("", "")
    for _, point, kind, *_ in mounts:
        inside = text == point or text.startswith(point.rstrip("/") + "/")
        if inside and len(point) >= len(best[0]):
            best = (point, kind)
    return best[1] in ("tmpfs", "ramfs")


def _join(steps: list[int]) -> str:
    return ", ".join(map(str, steps))
