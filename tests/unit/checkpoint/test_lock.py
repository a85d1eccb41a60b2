"""One job at a time in a run folder, with and without a file system that has locks."""

import errno
import fcntl
import json
import os
import subprocess
import sys
from pathlib import Path

import pytest
from folders import open_folder

from torchtitan.checkpoint.lock import FolderInUse, FolderLock
from torchtitan.config import ConfigError

HOLD = """
import sys, time
from pathlib import Path
from torchtitan.checkpoint.lock import FolderLock
lock = FolderLock(Path(sys.argv[1]), "run7")
print("held", flush=True)
time.sleep(100)
"""


@pytest.mark.fault("F50")
def test_second_job_is_refused(tmp_path: Path) -> None:
    command = [sys.executable, "-c", HOLD, str(tmp_path)]
    with subprocess.Popen(command, stdout=subprocess.PIPE, text=True) as holder:
        try:
            assert holder.stdout is not None and holder.stdout.readline() == "held\n"
            with pytest.raises(ConfigError) as caught:
                open_folder(tmp_path)
        finally:
            holder.kill()
    assert f"process {holder.pid}, run run7" in str(caught.value)
    assert not (tmp_path / "run_status.json").exists()
    # The lock of a killed job is nobody's.
    assert open_folder(tmp_path).decision.action == "new"


@pytest.mark.fault("F50")
def test_file_system_without_locks(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    def unsupported(*args: object) -> None:
        raise OSError(errno.ENOLCK, "No locks available")

    monkeypatch.setattr(fcntl, "flock", unsupported)
    lock = FolderLock(tmp_path)
    lock.release()
    with subprocess.Popen(["sleep", "100"]) as other:
        for holder, refuses in [
            ({"host": os.uname().nodename, "pid": other.pid}, True),
            ({"host": "elsewhere", "pid": 1}, True),
            ({"host": os.uname().nodename, "pid": 2**22 + 1}, False),
        ]:
            (tmp_path / ".lock").write_text(json.dumps(holder))
            if refuses:
                with pytest.raises(FolderInUse, match=str(holder["host"])):
                    FolderLock(tmp_path)
            else:
                FolderLock(tmp_path).release()
        other.kill()
