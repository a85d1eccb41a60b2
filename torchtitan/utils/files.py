"""Reading small files that somebody names. No torch."""

import os
import stat
from pathlib import Path


class NotARegularFileError(OSError):
    """A pipe, a device or a socket: reading it may take for ever, and works once."""


def read_regular_file(path: Path, max_bytes: int) -> bytes:
    """Return at most the first `max_bytes` of a file. Raises OSError; IsADirectoryError for a
    folder, NotARegularFileError for what is no file in another way, without opening it for long."""
    descriptor = os.open(path, os.O_RDONLY | os.O_NONBLOCK | os.O_CLOEXEC)
    with open(descriptor, "rb") as file:
        kind = os.fstat(descriptor).st_mode
        if stat.S_ISDIR(kind):
            raise IsADirectoryError(f"{path} is a folder")
        if not stat.S_ISREG(kind):
            raise NotARegularFileError(f"{path} is not a regular file")
        return file.read(max_bytes)
