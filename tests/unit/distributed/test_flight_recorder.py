"""Records of collectives, written when a run fails."""

import json
import os
import subprocess
import sys
from pathlib import Path

import pytest

from tests.distributed.runs import environment
from tests.forked import execute
from torchtitan.config.schema import Comm
from torchtitan.distributed import flight_recorder
from torchtitan.distributed.flight_recorder import FlightRecorder

FAILS = """
import logging, sys
from pathlib import Path
import torch, torch.distributed as dist
from torchtitan.config import DataError
from torchtitan.config.schema import Comm
from torchtitan.distributed.flight_recorder import FlightRecorder
from torchtitan.distributed.context import open_context
from torchtitan.utils.environment import ProcessEnvironment

logging.basicConfig(stream=sys.stderr, format="%(levelname)s %(message)s")
folder, size, error, *prefix = sys.argv[1:]
section = Comm(trace_buf_size=int(size), save_traces_folder="traces",
               **({{"save_traces_file_prefix": prefix[0]}} if prefix else {{}}))
recorder = FlightRecorder(section, Path(folder), 0, "cpu")
with open_context("cpu", ProcessEnvironment(), 20), recorder:
    for count in range(1, 8):
        dist.all_reduce(torch.zeros(count))
    if error:
        raise {{"data": DataError, "other": OSError}}[error]("told by itself")
""".replace("{{", "{").replace("}}", "}")


def run(folder: Path, size: int, error: str, *prefix: str) -> subprocess.CompletedProcess[str]:
    words = [sys.executable, "-c", FAILS, str(folder), str(size), error, *prefix]
    return execute(
        words,
        env={k: v for k, v in environment().items() if not k.startswith(("TORCH_", "OMP_"))},
    )


def test_an_error_leaves_the_newest_collectives(tmp_path: Path) -> None:
    done = run(tmp_path, 3, "other", "node-")
    assert done.returncode == 1 and "OSError: told by itself" in done.stderr
    assert "WARNING The newest collectives of this rank are in" in done.stderr
    [file] = (tmp_path / "traces").iterdir()
    assert file.name == "node-0.jsonl"
    lines = [json.loads(line) for line in file.read_text().splitlines()]
    assert [line["operation"] for line in lines] == ["all_reduce"] * 3
    assert [line["sizes"] for line in lines] == [[[5]], [[6]], [[7]]]
    numbers = [line["number"] for line in lines]
    assert numbers == list(range(numbers[0], numbers[0] + 3))
    assert all(line["group"] == "default_pg" and line["ranks"] == [0] for line in lines)


@pytest.mark.parametrize(("size", "error"), [(3, ""), (3, "data"), (0, "other")])
def test_nothing_is_left_without_need(tmp_path: Path, size: int, error: str) -> None:
    """After a good run, after an error that says itself what it is, or when it is off."""
    run(tmp_path, size, error)
    assert not (tmp_path / "traces").exists()


def test_a_torch_that_records_nothing_over_gloo_leaves_no_empty_file(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch, caplog: pytest.LogCaptureFixture
) -> None:
    monkeypatch.setattr(flight_recorder, "gloo_trace", lambda: None)
    monkeypatch.setenv("TORCH_FR_BUFFER_SIZE", "3")  # for the recorder to set no variable
    with pytest.raises(OSError), FlightRecorder(Comm(), tmp_path, 0, "cpu"):
        raise OSError
    assert list(tmp_path.iterdir()) == []
    assert caplog.messages == ["No collectives of this rank are recorded"]


@pytest.mark.parametrize("watchdog", [False, True])
def test_what_nccl_s_watchdog_has_written_is_kept_but_not_an_earlier_start_s(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch, watchdog: bool
) -> None:
    """On a CPU, with a stand-in for NCCL's ring."""
    for name in ("BUFFER_SIZE", "DUMP_TEMP_FILE"):
        monkeypatch.setenv(f"TORCH_FR_{name}", "5")
    monkeypatch.setenv("TORCH_NCCL_DUMP_ON_TIMEOUT", "1")
    monkeypatch.setattr(flight_recorder, "nccl_trace", lambda: b"written here")
    file = tmp_path / "comm_traces" / "rank_0"
    file.parent.mkdir()
    file.write_bytes(b"earlier")
    os.utime(file, (1, 1))
    with pytest.raises(OSError), FlightRecorder(Comm(), tmp_path, 0, "cuda"):
        if watchdog:
            file.write_bytes(b"by the watchdog")
        raise OSError
    assert file.read_bytes() == (b"by the watchdog" if watchdog else b"written here")


def test_variables_of_nccl_are_set_and_those_of_users_kept(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    """On a CPU this is as far as NCCL's recorder can be tested."""
    names = ["TORCH_FR_BUFFER_SIZE", "TORCH_NCCL_DUMP_ON_TIMEOUT", "TORCH_FR_DUMP_TEMP_FILE"]
    older = ["TORCH_NCCL_TRACE_BUFFER_SIZE", "TORCH_NCCL_DEBUG_INFO_TEMP_FILE"]
    for name in names + older:
        monkeypatch.setenv(name, "")  # so that it is as before afterwards
        monkeypatch.delenv(name)
    FlightRecorder(Comm(trace_buf_size=5), tmp_path, 3, "cuda")
    file = str(tmp_path / "comm_traces" / "rank_")
    assert [os.environ.pop(name) for name in names] == ["5", "1", file]
    assert not set(older) & os.environ.keys(), "torch warns of them"
    assert (tmp_path / "comm_traces").is_dir(), "NCCL makes none"

    monkeypatch.setenv("TORCH_NCCL_TRACE_BUFFER_SIZE", "7")
    monkeypatch.setenv("TORCH_FR_DUMP_TEMP_FILE", "mine")
    FlightRecorder(Comm(), tmp_path, 3, "cuda")
    assert "TORCH_FR_BUFFER_SIZE" not in os.environ
    assert os.environ["TORCH_FR_DUMP_TEMP_FILE"] == "mine"
