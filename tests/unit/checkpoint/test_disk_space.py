"""Disks and limits that have no room for what a run writes."""

import json
import subprocess
import sys
from pathlib import Path

import pytest

from torchtitan.checkpoint.disk_space import file_limit_problems
from torchtitan.utils.text import format_bytes

_NO_INODES = """
import os, sys
from pathlib import Path
sys.path[:0] = sys.argv[2:]
from folders import make_config
from torchtitan.checkpoint.run_folder import RunFolder
from torchtitan.config.run_context import RunContext

path = Path(sys.argv[1])
config = make_config(path / "run")
folder = RunFolder.open(config, RunContext(config, 1, "cpu"))
folder.begin()
try:
    for number in range(10**6):
        (path / str(number)).touch()
except OSError as error:
    print(error.strerror)
folder.set_status("failed", 3, 4)
print((path / "run" / "run_status.json").read_text())
"""


def test_status_is_told_where_no_file_can_be_made(tmp_path: Path) -> None:
    """A file system of 40 inodes, all of them used: the job has ended all the same."""
    mount = f"mount -t tmpfs -o nr_inodes=40 none {tmp_path}"
    own = ["unshare", "--map-root-user", "--mount", "sh", "-c", f'{mount} && exec "$@"', "sh"]
    try:
        subprocess.run([*own, "true"], check=True, capture_output=True)
    except (OSError, subprocess.CalledProcessError):
        pytest.skip("this machine lets nobody mount a file system of their own")
    command = [sys.executable, "-c", _NO_INODES, str(tmp_path), *sys.path]
    command += [str(Path(__file__).parent)]
    done = subprocess.run([*own, *command], capture_output=True, text=True, timeout=60)
    refused, _, status = done.stdout.partition("\n")
    assert refused == "No space left on device", done.stderr
    told = json.loads(status)
    assert (told["status"], told["step"], told["exit_code"]) == ("failed", 3, 4)


def test_bytes_are_shown_in_a_unit_that_fits() -> None:
    numbers = (0, 704, 1024, 1_572_864, 150 * 2**20, 2 * 2**30, 3.5 * 2**40)
    shown = "0 bytes, 704 bytes, 1.0 KiB, 1.5 MiB, 150 MiB, 2.0 GiB, 3.5 TiB"
    assert ", ".join(map(format_bytes, numbers)) == shown


def test_limit_on_the_size_of_files_is_told_before_training(tmp_path: Path) -> None:
    assert file_limit_problems(tmp_path, 3000, [None, 1500]) == []
    assert file_limit_problems(tmp_path, 3000, [None, None]) == []
    (problem,) = file_limit_problems(tmp_path, 8000, [None, 1500])
    assert "needs files of 3.9 KiB or more, and a process may write at most 1.5 KiB" in str(problem)
    assert "ulimit -f" in problem.fix
