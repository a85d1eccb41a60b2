"""Files that are whole or absent, whenever the machine stops. No torch."""

import errno
import os
import secrets
import stat
from pathlib import Path
from typing import IO

PRIVATE_TO_WRITE = 0o775
"""Mode of folders: without write access for others, whatever the umask."""
TRUST_FIX = "`chmod o-w` it, or set checkpoint.trust_path"


def write_atomically(path: Path, text: str) -> None:
    """Replace `path` by a file with this text; a reader sees the old file or the new one."""
    temporary = path.with_name(f".{path.name}.{secrets.token_hex(4)}")
    try:
        with open(temporary, "x", encoding="utf-8") as file:
            file.write(text)
            file.flush()
            os.fsync(file.fileno())
        os.replace(temporary, path)
    except BaseException:
        temporary.unlink(missing_ok=True)
        raise
    sync_folder(path.parent)


def write_in_place(path: Path, text: str) -> None:
    """Overwrite a file that exists: for a file system with no room, or no name, for another one. A
    reader may see half of the text."""
    with open(path, "r+b", buffering=0) as file:
        content = text.encode()
        if file.write(content) != len(content):
            raise OSError(errno.ENOSPC, os.strerror(errno.ENOSPC), str(path))
        file.truncate()
        os.fsync(file.fileno())


def writable_by_anybody(path: Path) -> bool:
    """Return whether the mode of a file or folder lets all users of the machine change it."""
    return bool(os.stat(path).st_mode & stat.S_IWOTH)


def replaceable_by_anybody(folder: Path) -> bool:
    """Whether all users of the machine may rename what is in `folder`: with the sticky bit, as
    /tmp has it, only the owners may."""
    return writable_by_anybody(folder) and not os.stat(folder).st_mode & stat.S_ISVTX


def unprotected_parent(path: Path) -> Path | None:
    """Return the nearest folder above `path` in which anybody may put another in its place."""
    parents = (parent for parent in path.resolve().parents if parent.exists())
    return next(filter(replaceable_by_anybody, parents), None)


def sync_folder(folder: Path) -> None:
    """Make the names in a folder durable, after files in it were created or renamed."""
    descriptor = os.open(folder, os.O_RDONLY | os.O_DIRECTORY)
    try:
        os.fsync(descriptor)
    finally:
        os.close(descriptor)


def open_regular(path: Path) -> IO[bytes]:
    """Open for reading what must be a regular file: no link, no pipe that would block."""
    descriptor = os.open(path, os.O_RDONLY | os.O_NOFOLLOW | os.O_NONBLOCK)
    if not stat.S_ISREG(os.fstat(descriptor).st_mode):
        os.close(descriptor)
        raise OSError(None, "is not a regular file")
    return os.fdopen(descriptor, "rb", buffering=0)
