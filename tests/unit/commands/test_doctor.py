"""The doctor: alone, with a config, and with all processes of a run."""

import os
import sys
from contextlib import closing
from pathlib import Path
from typing import Any

import pytest

from tests.distributed import runs
from tests.forked import ForkedRun, execute
from tests.pool import GlooPool
from torchtitan.cli import main
from torchtitan.commands.doctor.findings import Finding, of_problem
from torchtitan.commands.doctor.processes import (
    MIB,
    AxisSpeed,
    GroupSpeed,
    axis_finding,
    measure_axis,
)
from torchtitan.config.errors import ConfigIssue
from torchtitan.distributed.context import DistributedContext

CONFIG = """
[training]
dataset = "stdlib"
seq_len = 64
local_batch_size = 2
"""


@pytest.fixture(autouse=True)
def alone(monkeypatch: pytest.MonkeyPatch, tmp_path: Path) -> None:
    for name in ("RANK", "WORLD_SIZE", "LOCAL_RANK", "LOCAL_WORLD_SIZE", "MASTER_ADDR"):
        monkeypatch.delenv(name, raising=False)
    monkeypatch.chdir(tmp_path)


def examine(*arguments: str, capsys: Any) -> tuple[int, dict[str, str]]:
    """The exit status, and the lines by subject."""
    status = main(["doctor", *arguments, "--quick"])
    return status, by_subject(capsys.readouterr().out)


def by_subject(text: str) -> dict[str, str]:
    lines = {}
    for line in text.splitlines():
        mark, _, rest = line.partition(" ")
        assert mark in ("ok", "WRONG", "look", "-"), line
        lines[rest.strip().partition(":")[0]] = line
    return lines


def write_config(folder: Path, text: str = "") -> str:
    path = folder / "run.toml"
    path.write_text(CONFIG + text)
    return str(path)


def test_alone(capsys: Any, tmp_path: Path) -> None:
    status, lines = examine(capsys=capsys)
    assert status == 0
    for subject in ("torchtitan", "python", "torch", "gloo", "device", "run folder"):
        assert lines[subject].startswith("ok "), lines[subject]
    assert "/outputs, not there yet; writable" in lines["run folder"]
    assert "(debug.threads = 0)" in lines["threads"] and "glibc" in lines["allocator"]
    assert lines["launcher"].endswith("one process")
    assert list(tmp_path.iterdir()) == []


def test_with_a_config(capsys: Any, tmp_path: Path) -> None:
    config = write_config(tmp_path, "document_mask = true\n[debug]\nthreads = 1\n")
    for arguments in ([config], ["--job.config_file", config]):
        status, lines = examine(*arguments, "--job.device=cpu", capsys=capsys)
        assert status == 0, lines
        assert lines["config"].startswith("ok ") and " x 64 = 128 tokens" in lines["config"]
        assert "document by document" in lines["attention"]
        assert "1 for each process (debug.threads = 1)" in lines["threads"]
    window = ("--job.device=cpu", "--model.args.sliding_window=8")
    _, lines = examine(config, *window, capsys=capsys)
    assert "a mask of documents and a window" in lines["attention"]


def test_what_a_config_lacks_is_wrong(capsys: Any, tmp_path: Path) -> None:
    config = write_config(tmp_path, '[model]\ntokenizer_path = "no/such"\n')
    status, lines = examine(config, "--job.device=cuda", capsys=capsys)
    assert status == 1
    wrong = [line for line in lines.values() if line.startswith("WRONG")]
    assert any("model.tokenizer_path" in line and "Fix: " in line for line in wrong)
    assert any("job.device" in line and "no CUDA device" in line for line in wrong)
    assert "config" not in lines


def test_a_folder_that_cannot_be_written(capsys: Any, tmp_path: Path) -> None:
    (tmp_path / "file").write_text("")
    status, lines = examine("--job.dump_folder", str(tmp_path / "file"), capsys=capsys)
    assert status == 1
    assert lines["run folder"].startswith("WRONG") and "job.dump_folder" in lines["run folder"]


def test_variables_that_contradict(capsys: Any, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setenv("WORLD_SIZE", "two")
    status, lines = examine(capsys=capsys)
    assert status == 1
    assert lines["launcher"].startswith("WRONG") and "WORLD_SIZE = two" in lines["launcher"]


def test_a_problem_as_a_finding() -> None:
    finding = of_problem(ConfigIssue("data.a", "is: bad.", "mend it", "x: y. Fix: z"))
    assert finding == Finding(False, 'data.a = "x: y. Fix: z"', "is: bad", "mend it")
    assert finding.line() == 'WRONG  data.a = "x: y. Fix: z": is: bad. Fix: mend it'
    warning = of_problem(ConfigIssue("a", "b", "c", severity="warning"))
    assert warning.line() == "look   a: b. Fix: c"


def measured(world: DistributedContext) -> list[AxisSpeed]:
    from torch.distributed.device_mesh import init_device_mesh

    mesh = init_device_mesh("cpu", (2, 2), mesh_dim_names=("dp_shard", "tp"))
    return [measure_axis(mesh, axis, world, size_bytes=MIB) for axis in ("dp_shard", "tp")]


def test_each_axis_is_measured_by_its_own_groups(gloo_pool: GlooPool) -> None:
    results = gloo_pool.run(4, measured)
    assert all(result == results[0] for result in results), "every rank knows the same"
    dp_shard, tp = results[0]
    assert [group.ranks for group in dp_shard.groups] == [(0, 2), (1, 3)]
    assert [group.ranks for group in tp.groups] == [(0, 1), (2, 3)]
    for group in (*dp_shard.groups, *tp.groups):
        assert 1e6 < group.all_reduce_bytes_per_second < 1e12
        assert 1e6 < group.all_gather_bytes_per_second < 1e12
        assert 0 < group.latency_seconds < 10


def speed(axis: str, *rates: float) -> AxisSpeed:
    groups = [
        GroupSpeed((2 * index, 2 * index + 1), rate, rate / 2, 1e-4 * (index + 1))
        for index, rate in enumerate(rates)
    ]
    return AxisSpeed(axis, tuple(groups))


def test_words_about_an_axis() -> None:
    hosts = ["a", "a", "b", "b"]
    assert axis_finding(speed("tp", 4e9, 3e9), hosts).line() == (
        "ok     mesh axis tp: all-reduce 3.00 GB/s, all-gather 1.50 GB/s, latency 200 µs"
        " (2 ranks, 2 groups at once)"
    )
    uneven = axis_finding(speed("dp_shard", 4e9, 0.5e9), hosts).line()
    assert uneven.startswith("look ") and "ranks 2, 3 is 8 times slower" in uneven
    assert "links of b" in uneven
    apart = axis_finding(speed("tp", 4e9), ["a", "b"]).line()
    assert apart.startswith("look ") and "parallelism.tensor_parallel_degree" in apart
    assert axis_finding(speed("pp", 4e9), ["a", "b"]).ok is True


def test_under_torchrun(tmp_path: Path) -> None:
    config = write_config(tmp_path, "[parallelism]\ntensor_parallel_degree = 2\n")
    command = ["-m", "torch.distributed.run", "--nproc_per_node=4", "--rdzv-backend=c10d"]
    command += ["--rdzv-endpoint=localhost:0", "-m", "torchtitan", "doctor"]
    command += ["--job.config_file", config, "--job.device=cpu"]
    done = execute([sys.executable, *command], env=runs.environment(), cwd=tmp_path)
    assert done.returncode == 0, done.stdout + done.stderr
    lines = by_subject(done.stdout)  # of rank 0 alone, or a subject would come twice
    assert len(lines) == len(done.stdout.splitlines())
    assert "rank 0 of 4" in lines["launcher"]
    assert "4 processes on 1 machine have met" in lines["processes"]
    assert lines["shared folder"].startswith("ok ")
    for axis in ("dp_shard", "tp"):
        line = lines[f"mesh axis {axis}"]
        assert "GB/s" in line and "latency" in line and "2 ranks, 2 groups" in line
    assert {"mesh axis pp", "mesh axis cp"} & set(lines) == set()
    assert not list(tmp_path.glob(".torchtitan-doctor-*"))


def test_ranks_that_see_another_folder(tmp_path: Path) -> None:
    """As on machines without a file system in common."""
    folders = [tmp_path / "one", tmp_path / "two"]
    config = write_config(tmp_path, "[parallelism]\ntensor_parallel_degree = 2\n")
    processes = []
    for folder in folders:
        folder.mkdir()
    launch = runs.launcher_variables(len(folders))
    for variables, folder in zip(launch, folders, strict=True):
        words = [sys.executable, "-m", "torchtitan", "doctor", config, "--job.device=cpu"]
        processes.append(ForkedRun(words, runs.environment() | variables, folder))
    told = []
    for process in processes:
        with closing(process):
            told.append(process.wait(240))
    assert [done.returncode for done in told] == [1, 1]
    line = by_subject(told[0].stdout)["shared folder"]
    assert line.startswith("WRONG") and "1 of 2 processes see another one: rank 1 on " in line
    assert "job.dump_folder" in line
    assert told[1].stdout == "" and "shared folder" not in told[1].stderr, "rank 0 says it for all"
    assert os.listdir(folders[0]) == os.listdir(folders[1]) == []
