"""Room for the next checkpoint: bytes and files on disk, and host memory for copies. No torch."""

import logging
import os
import resource
import shutil
import socket
from collections.abc import Mapping, Sequence
from pathlib import Path
from typing import TYPE_CHECKING, NamedTuple

from torchtitan.config import ConfigError, ConfigIssue
from torchtitan.config.schema import Checkpoint
from torchtitan.utils.host import available_bytes
from torchtitan.utils.text import format_bytes

if TYPE_CHECKING:
    from torchtitan.distributed.context import DistributedContext

logger = logging.getLogger(__name__)

SPACE_FACTOR = 1.2
"""A margin: files of the run grow, and other programs write to the disk, too."""


class FreeSpace(NamedTuple):
    """The bytes and inodes that a user may still write; `num_files` is None if not counted."""

    num_bytes: int
    num_files: int | None


def free_space(folder: Path) -> FreeSpace:
    """Return the free space on the file system of `folder`, as far as it reports it."""
    counts = os.statvfs(folder)
    # File systems that allocate inodes on demand say 0 of 0.
    num_files = counts.f_favail if counts.f_files > 0 else None
    return FreeSpace(shutil.disk_usage(folder).free, num_files)


def space_problems(
    folder: Path, section: Checkpoint, num_bytes: int, num_files: int, free: FreeSpace
) -> list[ConfigIssue]:
    """Return the problems of saving so much; warnings with `checkpoint.allow_low_disk`."""
    needed_bytes, needed_files = SPACE_FACTOR * num_bytes, SPACE_FACTOR * num_files
    lacks = []
    if free.num_bytes < needed_bytes:
        lacks.append(
            f"needs {format_bytes(needed_bytes)} for the next checkpoint,"
            f" {format_bytes(free.num_bytes)} are free"
        )
    if free.num_files is not None and free.num_files < needed_files:
        lacks.append(
            f"needs {needed_files:.0f} files for the next checkpoint, and the file system has room"
            f" for {free.num_files} (its inodes are used up)"
        )
    fix = "free some space, or put job.dump_folder on a larger disk; or set"
    fix += " checkpoint.allow_low_disk to try anyway"
    severity = "warning" if section.allow_low_disk else "error"
    return [
        ConfigIssue("checkpoint.folder", lack, fix, str(folder), severity=severity)
        for lack in lacks
    ]


def file_limit() -> int | None:
    """Return the largest file this process may write (`ulimit -f`); None for no limit."""
    limit = resource.getrlimit(resource.RLIMIT_FSIZE)[0]
    return None if limit == resource.RLIM_INFINITY else limit


def file_limit_problems(
    folder: Path, num_bytes: int, limits: Sequence[int | None]
) -> list[ConfigIssue]:
    """Return the problem of a checkpoint with one file per rank under the ranks' `limits`.

    The largest file has at least the mean size.
    """
    mean = num_bytes // len(limits)
    lowest = min((limit for limit in limits if limit is not None), default=mean)
    if mean <= lowest:
        return []
    text = (
        f"needs files of {format_bytes(mean)} or more, and a process may write at most"
        f" {format_bytes(lowest)} into one"
    )
    fix = "raise the limit (`ulimit -f unlimited`)"
    return [ConfigIssue("checkpoint.folder", text, fix, str(folder))]


def require_space(
    section: Checkpoint,
    folder: Path,
    world: "DistributedContext",
    sizes: Mapping[str, int],
    num_files: int,
) -> None:
    """Raise `ConfigError` on all ranks if the disk has no room for their tensors.

    `sizes`: bytes of this rank's tensors by name; a name that several ranks have counts once.
    """
    shares = world.gather_distinct_json(dict(sizes))
    num_bytes = sum({name: size for share in shares for name, size in share.items()}.values())
    free = FreeSpace(*world.broadcast_json(free_space(folder)))
    problems = space_problems(folder, section, num_bytes, num_files, free)
    if problems and not section.allow_low_disk:
        raise ConfigError(problems)
    if problems and world.is_main:
        logger.warning("%s", "; ".join(map(str, problems)))
    problems = file_limit_problems(folder, num_bytes, world.gather_json(file_limit()))
    if problems:
        raise ConfigError(problems)


def require_memory(mode: str, world: "DistributedContext", num_bytes: int) -> None:
    """Raise `ConfigError` on all ranks if a machine lacks memory for its ranks' copies."""
    ranks = world.gather_json([socket.gethostname(), num_bytes, available_bytes()])
    for host in sorted({host for host, *_ in ranks}):
        needed = sum(size for name, size, _ in ranks if name == host)
        known = [free for name, _, free in ranks if name == host and free is not None]
        if known and min(known) < needed:
            text = (
                f"needs {format_bytes(needed)} of host memory on {host} for copies of what is"
                f" saved, {format_bytes(min(known))} are free"
            )
            raise ConfigError(
                ConfigIssue("checkpoint.async_mode", text, 'set it to "disabled"', mode)
            )
