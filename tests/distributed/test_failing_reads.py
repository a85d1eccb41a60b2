"""Runs whose disk fails: for a moment, for good, or without an answer, on one rank of two."""

import json
import os
import re
from collections.abc import Sequence
from pathlib import Path

import pytest

from tests.distributed import runs
from tests.distributed.test_lost_ranks import ranks_of, wait_until
from tests.forked import launcher_variables

_FAILING = """
import errno, os
from torchtitan.data import files, loader, reading

mode, steps = os.environ.get("FAILING", ""), 0
next_step = loader.Loader.next_step
reading.FIRST_PAUSE_SECONDS = 0.01
left = {"moments": 5, "forever": 1000}.get(mode, 0) if os.environ.get("RANK") == "1" else 0


def counted(self, *arguments):
    global steps
    steps += 1
    return next_step(self, *arguments)


def fail(path, mode):
    global left
    if steps >= 7 and left:
        left -= 1
        raise OSError(errno.EIO, "Input/output error", path)
    return open(path, mode)


loader.Loader.next_step, files.open = counted, fail
"""


@pytest.fixture
def arguments(tmp_path: Path) -> list[str]:
    """The settings of a run on many small files, so that every step opens some."""
    (tmp_path / "failing.py").write_text(_FAILING)
    folder = tmp_path / "data"
    folder.mkdir()
    for n in range(400):
        (folder / f"{n:03}.jsonl").write_text(json.dumps({"text": f"{n} " * (n % 9 + 9)}) + "\n")
    data = ["--training.dataset=json", f"--training.dataset_path={folder}"]
    return [*data, "--job.custom_import=failing"]


def run_two(folder: Path, arguments: Sequence[str], mode: str) -> list[tuple[int, str]]:
    """Exit status and output of each rank."""
    path = {"PYTHONPATH": f"{folder.parent}:{runs.environment()['PYTHONPATH']}"}
    env = [variables | path | {"FAILING": mode} for variables in launcher_variables(2)]
    with ranks_of(folder, [arguments] * 2, env) as ranks:
        return [rank.end(120) for rank in ranks]


@pytest.mark.fault("F38")
def test_a_failing_disk(arguments: list[str], tmp_path: Path) -> None:
    """A moment changes nothing. A failure for good ends both ranks, which say what failed and
    where, and a resume trains on what a run without it trains on."""
    whole, moments, failed = (tmp_path / name for name in ("whole", "moments", "failed"))
    assert [status for status, _ in run_two(whole, arguments, "")] == [0, 0]
    (first, _), (second, output) = run_two(moments, arguments, "moments")
    assert (first, second) == (0, 0), output
    assert output.count("Reading failed at ") == 5, output
    assert runs.curve(moments) == runs.curve(whole)
    (first, told), (second, output) = run_two(failed, arguments, "forever")
    assert (first, second) == (3, 3), told + output
    reason = r"reading failed 6 times at \S+/data/\d+\.jsonl \(byte 0\): OSError: \[Errno 5\]"
    assert re.search(reason, output) and re.search(f"rank 1: {reason}", told), told
    stored = runs.status(failed)
    assert (stored["status"], stored["exit_code"]) == ("failed", 3)
    assert len(runs.curve(failed)) < 10
    assert [status for status, _ in run_two(failed, arguments, "")] == [0, 0]
    assert runs.curve(failed) == runs.curve(whole)


@pytest.mark.fault("F39")
def test_a_disk_that_does_not_answer_is_named_before_others_give_up(tmp_path: Path) -> None:
    """A pipe without a writer stands for it; lanes 1 and 3, of rank 1, read the odd files."""
    folder, data = tmp_path / "run", tmp_path / "data"
    data.mkdir()
    for n in range(40):
        (data / f"{n:02}.txt").write_text(f"{n} words " * 300)
    arguments = ["--training.dataset=text", f"--training.dataset_path={data}", "--data.lanes=2"]
    arguments += ["--data.shuffle=false", "--training.steps=100000", "--checkpoint.enable=false"]
    arguments += ["--comm.train_timeout_seconds=10"]
    with ranks_of(folder, [arguments] * 2) as ranks:
        metrics = folder / "metrics.jsonl"
        wait_until(lambda: metrics.exists() and metrics.read_text().count("\n") > 2)
        for n in range(11, 40, 2):
            file = data / f"{n:02}.txt"
            os.mkfifo(f"{file}.new")
            os.replace(f"{file}.new", file)
        (first, told), (second, output) = (rank.end() for rank in ranks)
    assert (first, second) == (3, 3), told + output
    assert "Waiting for data for" in output, output
    assert f"rank 1: waits for data for 8 s, without a row, from {data}/" in told, told
    stored = runs.status(folder)
    assert (stored["status"], stored["exit_code"]) == ("failed", 3)
    assert "rank 1: waits for data" in stored["error"]


MESHES = {
    "dp": ("--parallelism.data_parallel_shard_degree=2", "--training.dataloader.num_workers=2"),
    "tp": ("--parallelism.tensor_parallel_degree=2", "--training.dataloader.num_workers=1"),
    "cp": ("--parallelism.context_parallel_degree=2",),
    "pp": ("--parallelism.pipeline_parallel_degree=2",),
}


@pytest.fixture(scope="module")
def left_out(tmp_path_factory: pytest.TempPathFactory) -> tuple[list[str], list[int]]:
    """Arguments of a run on data with 20 bad rows, and how many of them it had after each step."""
    folder = tmp_path_factory.mktemp("bad")
    rows = [json.dumps({"text": f"row {n} " * (n % 7 + 1)}) for n in range(60)]
    content = "".join(f"{row}\n" + "{\n" * (n % 3 == 0) for n, row in enumerate(rows))
    (folder / "rows.jsonl").write_text(content)
    data = ["--training.dataset=json", f"--training.dataset_path={folder / 'rows.jsonl'}"]
    data += ["--data.lanes=2", "--data.on_bad_row=skip", "--data.max_bad_rows=20"]
    arguments = [*data, "--checkpoint.enable=false", "--training.steps=12"]
    return arguments, bad_rows(folder / "run", arguments)


def bad_rows(folder: Path, arguments: Sequence[str], processes: int = 1) -> list[int]:
    runs.run(folder, *arguments, processes=processes)
    return [record.get("bad_rows", 0) for record in runs.records(folder)]


@pytest.mark.fault("F40")
@pytest.mark.parametrize(
    "mesh", ["dp", "tp", *(pytest.param(m, marks=pytest.mark.nightly) for m in ("cp", "pp"))]
)
def test_rows_left_out_are_counted_once_on_every_mesh(
    left_out: tuple[list[str], list[int]], mesh: str, tmp_path: Path
) -> None:
    """And in the first of the epochs only: the run would end at the next one."""
    arguments, expected = left_out
    assert expected[0] < expected[-1] == 20
    assert bad_rows(tmp_path / "run", [*arguments, *MESHES[mesh]], 2) == expected
