"""Records of collectives, written when a run fails, and read by torch's own analyser."""

import subprocess
import sys
from pathlib import Path

import pytest

from tests.distributed.runs import environment

FAILS = """
import logging, sys
from pathlib import Path
import torch, torch.distributed as dist
from torchtitan.config import DataError
from torchtitan.config.run_sections import Comm
from torchtitan.distributed.flight_recorder import FlightRecorder
from torchtitan.distributed.world import open_world
from torchtitan.utils.environment import ProcessEnvironment

logging.basicConfig(stream=sys.stderr, format="%(levelname)s %(message)s")
folder, size, error, *prefix = sys.argv[1:]
section = Comm(trace_buf_size=int(size), save_traces_folder="traces",
               **({{"save_traces_file_prefix": prefix[0]}} if prefix else {{}}))
recorder = FlightRecorder(section, Path(folder), 0, "cpu")
with open_world("cpu", ProcessEnvironment(), 20), recorder:
    for count in range(1, 8):
        dist.all_reduce(torch.zeros(count))
    if error:
        raise {{"data": DataError, "other": OSError}}[error]("told by itself")
""".replace("{{", "{").replace("}}", "}")


def run(folder: Path, size: int, error: str, *prefix: str) -> subprocess.CompletedProcess[str]:
    return subprocess.run(
        [sys.executable, "-c", FAILS, str(folder), str(size), error, *prefix],
        env={k: v for k, v in environment().items() if not k.startswith(("TORCH_", "OMP_"))},
        capture_output=True,
        text=True,
        timeout=120,
    )


def analysed(folder: Path, prefix: str) -> str:
    """What `python -m torch.distributed.flight_recorder.fr_trace` makes of the files."""
    command = ["-m", "torch.distributed.flight_recorder.fr_trace", str(folder)]
    done = subprocess.run(
        [sys.executable, *command, "--prefix", prefix, "--just_print_entries"],
        env=environment(),
        capture_output=True,
        text=True,
        timeout=120,
    )
    assert done.returncode == 0, done.stdout + done.stderr
    return done.stdout + done.stderr


def test_an_error_leaves_the_newest_collectives(tmp_path: Path) -> None:
    done = run(tmp_path, 3, "other", "node-")
    assert done.returncode == 1 and "OSError: told by itself" in done.stderr
    assert "WARNING Wrote the newest collectives" in done.stderr
    assert [path.name for path in (tmp_path / "traces").iterdir()] == ["node-0"]
    table = analysed(tmp_path / "traces", "node-")
    assert table.count("gloo:all_reduce") == 3, table


@pytest.mark.parametrize(("size", "error"), [(3, ""), (3, "data"), (0, "other")])
def test_nothing_is_left_without_need(tmp_path: Path, size: int, error: str) -> None:
    """After a good run, after an error that says itself what it is, or when it is off."""
    run(tmp_path, size, error)
    assert not (tmp_path / "traces").exists()
