"""Checks of the folders that a run writes: their names, and that they can be written."""

import os
import re
from pathlib import Path

from torchtitan.config.errors import ConfigIssue

_NAME = re.compile(r"(?!\.|.*\.\.)[A-Za-z0-9._-]{1,128}", re.ASCII)
_TAKEN = re.compile(
    r"config\.toml|run_status\.json|tokenizer|metrics(\.jsonl(\.damaged-[0-9]+)?)?|wandb|previous-[0-9]+"
)


def check_name(key: str, name: str) -> list[ConfigIssue]:
    """Check the name of a folder in the run folder."""
    if not _NAME.fullmatch(name):
        problem = "is not a plain name: letters, digits, `.`, `_`, `-`, no leading dot, no `..`"
    elif _TAKEN.fullmatch(name):
        problem = "is the name of something else in the run folder"
    else:
        return []
    return [ConfigIssue(key, problem, "choose another name; it lies in job.dump_folder", name)]


def check_writable(key: str, folder: Path, value: str) -> list[ConfigIssue]:
    """Check that the folder can be written or made; create nothing."""
    fix = "choose a folder that this user may write to"
    try:
        existing = next(path for path in (folder, *folder.parents) if path.exists())
    except OSError as error:  # such as a name that is too long
        return [ConfigIssue(key, f"cannot be used: {error.strerror or error}", fix, value)]
    if not existing.is_dir():
        return [ConfigIssue(key, f"{existing} is not a folder", fix, value)]
    if not os.access(existing, os.W_OK | os.X_OK):
        text = f"{existing} is not writable"
        return [ConfigIssue(key, text, fix, value, missing_asset=True)]
    return []
