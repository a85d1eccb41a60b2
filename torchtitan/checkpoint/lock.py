"""One job per run folder. No torch.

The lock is the kernel's (`flock`), so it ends with the process that holds it, also when that is
killed; a file left behind locks nothing. The file says who holds it. Where the file system has no
locks, that text is all there is: a living process of this machine is believed, and so is any other
machine whose job never said that it ended.
"""

import errno
import fcntl
import json
import os
import socket
from pathlib import Path
from typing import Any

LOCK_NAME = ".lock"
_UNSUPPORTED = {errno.ENOLCK, errno.ENOSYS, errno.ENOTSUP, errno.EOPNOTSUPP, errno.EINVAL}


class FolderInUse(Exception):
    """Another job holds the folder; the message names it."""


class FolderLock:
    """The lock of a run folder, held until `release` or the end of the process."""

    def __init__(self, folder: Path, run_id: str = ""):
        """Take the lock. Raises `FolderInUse`."""
        self.path = folder / LOCK_NAME
        # Programs that this one starts do not inherit it, and cannot keep it when they outlive it.
        self._descriptor = os.open(self.path, os.O_RDWR | os.O_CREAT | os.O_NOFOLLOW, 0o666)
        try:
            fcntl.flock(self._descriptor, fcntl.LOCK_EX | fcntl.LOCK_NB)
        except OSError as error:
            holder = self._read()
            unsupported = error.errno in _UNSUPPORTED
            if not unsupported or _may_be_alive(holder):
                os.close(self._descriptor)
                raise FolderInUse(_describe(holder)) from error
        self.name_run(run_id)

    def name_run(self, run_id: str) -> None:
        """Write into the lock file who holds it."""
        holder = {"host": socket.gethostname(), "pid": os.getpid(), "run_id": run_id}
        os.ftruncate(self._descriptor, 0)
        os.pwrite(self._descriptor, json.dumps(holder).encode(), 0)

    def release(self) -> None:
        """Let another job in. The file stays: removing it could remove a lock taken just now."""
        if self._descriptor >= 0:
            os.ftruncate(self._descriptor, 0)
            os.close(self._descriptor)
            self._descriptor = -1

    def _read(self) -> dict[str, Any]:
        try:
            holder = json.loads(os.pread(self._descriptor, 4096, 0))
        except ValueError:
            return {}
        return holder if isinstance(holder, dict) else {}


def _may_be_alive(holder: dict[str, Any]) -> bool:
    if not holder:
        return False
    if holder.get("host") != socket.gethostname():
        return True
    try:
        os.kill(int(holder.get("pid", -1)), 0)
    except PermissionError:
        return True
    except (OSError, ValueError, TypeError, OverflowError):
        return False
    return holder.get("pid") != os.getpid()


def _describe(holder: dict[str, Any]) -> str:
    if not holder:
        return "another job is using it"
    run = f", run {holder['run_id']}" if holder.get("run_id") else ""
    return f"another job is using it (host {holder.get('host')}, process {holder.get('pid')}{run})"
