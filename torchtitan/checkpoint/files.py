"""Permissions, and files that must be what they seem. No torch."""

import errno
import os
import stat
from pathlib import Path
from typing import IO

PRIVATE_TO_WRITE = 0o775
"""Mode of new folders: not writable by all users, whatever the umask."""
TRUST_FIX = "`chmod o-w` it, or set checkpoint.trust_path"


def write_in_place(path: Path, text: str) -> None:
    """Overwrite an existing file, on a disk that has no room for a second one.

    A reader may see half of the text.
    """
    with open(path, "r+b", buffering=0) as file:
        content = text.encode()
        if file.write(content) != len(content):
            raise OSError(errno.ENOSPC, os.strerror(errno.ENOSPC), str(path))
        file.truncate()
        os.fsync(file.fileno())


def writable_by_anybody(path: Path) -> bool:
    """Return whether all users of the machine may write to a file or folder."""
    return bool(os.stat(path).st_mode & stat.S_IWOTH)


def replaceable_by_anybody(folder: Path) -> bool:
    """Return whether all users may rename what is in `folder`; not with the sticky bit of /tmp."""
    return writable_by_anybody(folder) and not os.stat(folder).st_mode & stat.S_ISVTX


def unprotected_parent(path: Path) -> Path | None:
    """Return the nearest folder above `path` whose content all users may replace."""
    parents = (parent for parent in path.resolve().parents if parent.exists())
    return next(filter(replaceable_by_anybody, parents), None)


def open_regular(path: Path) -> IO[bytes]:
    """Open a regular file for reading; links and pipes raise OSError."""
    descriptor = os.open(path, os.O_RDONLY | os.O_NOFOLLOW | os.O_NONBLOCK)
    if not stat.S_ISREG(os.fstat(descriptor).st_mode):
        os.close(descriptor)
        raise OSError(None, "is not a regular file")
    return os.fdopen(descriptor, "rb", buffering=0)
