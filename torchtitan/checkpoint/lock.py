"""One job per run folder. No torch.

The lock is the kernel's (`flock`): it ends with its process, also when that is killed, and the file
left behind locks nothing. The file names the holder. On a file system without locks (NFS without a
lock daemon, Lustre without `-o flock`) the text decides: a living process of this machine holds the
lock, and so does any job of another machine that has not released it.
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
        # Child programs do not inherit it, so they cannot keep the lock when they outlive us.
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
        """Write host, process and run into the lock file."""
        holder = {"host": socket.gethostname(), "pid": os.getpid(), "run_id": run_id}
        os.ftruncate(self._descriptor, 0)
        os.pwrite(self._descriptor, json.dumps(holder).encode(), 0)

    def release(self) -> None:
        """Release the lock. The file stays: another job may just have locked it."""
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
