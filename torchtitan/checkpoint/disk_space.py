"""Whether the disk has room for the next checkpoint, in bytes and in files. No torch."""

import os
import resource
import shutil
from collections.abc import Sequence
from pathlib import Path
from typing import NamedTuple

from torchtitan.config import ConfigIssue
from torchtitan.config.schema import Checkpoint

SPACE_FACTOR = 1.2
"""A little more than what is known: files of the run grow, and others write to the disk, too."""


def shown_bytes(number: float) -> str:
    """Bytes in the unit in which they have three digits that count: `704 bytes`, `1.5 MiB`."""
    for power, unit in ((4, "TiB"), (3, "GiB"), (2, "MiB"), (1, "KiB")):
        if number >= 1024**power:
            return f"{number / 1024**power:.{1 if number < 100 * 1024**power else 0}f} {unit}"
    return f"{number:.0f} bytes"


class Room(NamedTuple):
    free_bytes: int
    free_files: int | None
    """That may still be created; None on file systems that do not count them."""


def room_in(folder: Path) -> Room:
    """What the file system of `folder` has left for this user, as far as it tells."""
    counts = os.statvfs(folder)
    # Some say 0 of 0 where they make room for files as they come.
    free_files = counts.f_favail if counts.f_files > 0 else None
    return Room(shutil.disk_usage(folder).free, free_files)


def file_limit() -> int | None:
    """The most bytes that this process may write into one file (`ulimit -f`); None for no limit."""
    limit = resource.getrlimit(resource.RLIMIT_FSIZE)[0]
    return None if limit == resource.RLIM_INFINITY else limit


def file_limit_problems(
    folder: Path, num_bytes: int, limits: Sequence[int | None]
) -> list[ConfigIssue]:
    """The problem of a checkpoint of so many bytes, in a file of each rank, where ranks have these
    limits on the size of a file. The largest file has at least the mean."""
    smallest = num_bytes // len(limits)
    lowest = min((limit for limit in limits if limit is not None), default=smallest)
    if smallest <= lowest:
        return []
    text = (
        f"needs files of {shown_bytes(smallest)} or more, and a process may write no more than"
        f" {shown_bytes(lowest)} into one"
    )
    fix = "raise the limit (`ulimit -f unlimited`)"
    return [ConfigIssue("checkpoint.folder", text, fix, str(folder))]


def room_problems(
    folder: Path, section: Checkpoint, num_bytes: int, num_files: int, room: Room
) -> list[ConfigIssue]:
    """What is too little for a checkpoint of so many bytes in so many files, in `folder`: an error,
    or a warning with `checkpoint.allow_low_disk`."""
    needed_bytes, needed_files = SPACE_FACTOR * num_bytes, SPACE_FACTOR * num_files
    lacks = []
    if room.free_bytes < needed_bytes:
        lacks.append(
            f"needs {shown_bytes(needed_bytes)} for the next checkpoint,"
            f" {shown_bytes(room.free_bytes)} are free"
        )
    if room.free_files is not None and room.free_files < needed_files:
        lacks.append(
            f"needs {needed_files:.0f} files for the next checkpoint, and the file system has room"
            f" for {room.free_files} (its inodes are used up)"
        )
    fix = (
        "free some space, or put job.dump_folder on a larger disk; checkpoint.allow_low_disk goes"
        " on regardless"
    )
    severity = "warning" if section.allow_low_disk else "error"
    return [
        ConfigIssue("checkpoint.folder", lack, fix, str(folder), severity=severity)
        for lack in lacks
    ]


def memory_problem(mode: str, host: str, needed: float, free: float) -> ConfigIssue:
    """That `host` has too little memory for copies of what is saved (bytes)."""
    text = (
        f"needs {shown_bytes(needed)} of host memory on {host} for copies of what is saved,"
        f" {shown_bytes(free)} are free"
    )
    return ConfigIssue("checkpoint.async_mode", text, 'set it to "disabled"', mode)
