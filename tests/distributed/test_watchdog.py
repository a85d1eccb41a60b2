"""The watchdog: a rank that is stuck ends with its stack in a report, and a healthy one is left."""

import itertools
import mmap
import os
import tempfile
import threading
import time
from collections.abc import Callable, Sequence
from pathlib import Path
from statistics import median
from types import SimpleNamespace
from typing import Any

import pytest
import torch
import torch.distributed as dist
from torch.distributed import _functional_collectives as funcol

from tests.distributed import runs
from tests.distributed.test_lost_ranks import ranks_of, wait_until
from tests.forked import CONTEXT, launcher_variables
from tests.pool import GlooPool
from torchtitan.distributed import hang_report, watchdog
from torchtitan.distributed.context import DistributedContext
from torchtitan.distributed.hang_report import Rank, Sign, Silence
from torchtitan.distributed.watchdog import Watchdog
from torchtitan.metrics.rank_times import RankTimes
from torchtitan.utils.torch_compat import observe_waits

LONG = ("--training.steps=100000", "--checkpoint.enable=false")

STUCK = """
import ctypes, os, pkgutil, time

place, _, name = os.environ["STUCK_AT"].rpartition(".")
holder = pkgutil.resolve_name(place)
function, calls = getattr(holder, name), 0


def stand_still(*arguments, **named):
    global calls
    calls += 1
    if calls == 5 and os.environ.get("RANK", "1") == "1":
        while True:
            time.sleep(99) if os.environ["STUCK_IN"] == "sleep" else ctypes.PyDLL(None).sleep(99)
    return function(*arguments, **named)


setattr(holder, name, stand_still)
"""
READ = "torchtitan.data.loader.Loader.next_step"
TRAIN = "torchtitan.parallel.runner.SPMDRunner.forward_backward"


def processes_of(folder: Path) -> list[str]:
    """The command lines that name the folder."""
    lines = []
    for path in Path("/proc").glob("[0-9]*/cmdline"):
        try:
            lines.append(path.read_bytes().replace(b"\0", b" ").decode(errors="replace"))
        except OSError:
            continue
    return [line for line in lines if str(folder) in line and "hang_report" in line]


def run_stuck(
    folder: Path, site: str, how: str, timeout_seconds: int, world_size: int = 2
) -> list[tuple[int, str]]:
    """The exit status and output of each rank; the last rank gets stuck in its fifth step."""
    (folder.parent / "stuck.py").write_text(STUCK)
    path = os.pathsep.join([str(folder.parent), runs.environment()["PYTHONPATH"]])
    own = {"PYTHONPATH": path, "STUCK_AT": site, "STUCK_IN": how}
    variables: Sequence[dict[str, str]] = [{}]
    if world_size > 1:
        variables = launcher_variables(world_size)
    arguments = (*LONG, "--job.custom_import=stuck")
    arguments += (f"--comm.train_timeout_seconds={timeout_seconds}",)
    env = [rank | own for rank in variables]
    with ranks_of(folder, [arguments] * world_size, env) as ranks:
        return [rank.end(120) for rank in ranks]


@pytest.mark.fault("F42", "F43")
@pytest.mark.parametrize(
    ("site", "how", "place"),
    [
        (READ, "sleep", "after step 3 in the phase data"),  # ahead, in step 4
        (TRAIN, "gil", "after step 4 in the phase compute"),
    ],
    ids=["sleep", "held-gil"],
)
def test_a_stuck_rank_ends_with_its_stack_in_the_report(
    site: str, how: str, place: str, tmp_path: Path
) -> None:
    """Both ranks end; no process, and no lock, is left."""
    folder = tmp_path / "run"
    (waiting, output), (stuck, _) = run_stuck(folder, site, how, timeout_seconds=2)
    assert (waiting, stuck) == (6, 6), output
    assert str(folder / "hang.txt") in output.splitlines()[-1], output
    report = (folder / "hang.txt").read_text()
    assert report.startswith(f"Rank 1 was late first: stuck {place}, "), report
    _, waited, stacks = report.partition("\nrank 0 ")
    assert waited and ": waited after step " in stacks and "work.wait()" in stacks, report
    assert "in stand_still" in report.partition("\nrank 1 ")[2], report
    stored = runs.status(folder)
    assert (stored["status"], stored["exit_code"]) == ("failed", 6)
    wait_until(lambda: not processes_of(folder))


@pytest.mark.fault("F43")
def test_a_run_of_one_rank_ends_when_it_is_stuck(tmp_path: Path) -> None:
    """Nobody waits for it; its silence tells."""
    folder = tmp_path / "run"
    ((status, output),) = run_stuck(folder, TRAIN, "gil", timeout_seconds=1, world_size=1)
    assert status == 6, output
    assert "Rank 0 was late first: stuck after step 4 in the phase compute" in output
    assert "in stand_still" in (folder / "hang.txt").read_text()
    stored = runs.status(folder)
    assert (stored["status"], stored["exit_code"], stored["step"]) == ("failed", 6, 4)
    assert stored["error"].startswith("Rank 0 was late first"), stored


@pytest.mark.parametrize("watched", [True, False])
def test_the_watching_process_ends_with_its_rank(watched: bool, tmp_path: Path) -> None:
    folder = tmp_path / "run"
    with ranks_of(folder, [(*LONG, f"--comm.watchdog={str(watched).lower()}")]) as (rank,):
        wait_until((folder / "metrics.jsonl").exists)
        assert len(processes_of(folder)) == int(watched)
        rank.process.kill()
        wait_until(lambda: not processes_of(folder))
    assert not (folder / "hang.txt").exists()


def _stand_still(folder: Path) -> None:
    watchdog = Watchdog(timeout_seconds=1.0)
    watchdog.start(folder, 1)
    watchdog.sign("checkpoint", 3)
    time.sleep(1000)


@pytest.mark.parametrize("trace", ["status", "record"])
def test_a_rank_of_a_failed_run_ends_in_a_phase_without_a_limit(trace: str, tmp_path: Path) -> None:
    """Soon if another rank has waited in vain, else after the timeout."""
    if trace == "status":
        (tmp_path / "run_status.json").write_text('{"status": "failed"}')
    else:
        place, sign = str(tmp_path / hang_report.RECORDS_NAME / "1"), sign_of(1, "compute")
        hang_report.write_record(place, 1, 1, sign, 100, "waited", "stack of 1")
    process: Any = CONTEXT.Process(target=_stand_still, args=(tmp_path,))
    process.start()
    process.join(100)
    try:
        assert process.exitcode == 6
    finally:
        process.kill()
        process.join()
    assert "in _stand_still" in (tmp_path / "hang.txt").read_text()


def test_a_stuck_rank_ends_although_no_report_can_be_written(tmp_path: Path) -> None:
    (tmp_path / "run_status.json").write_text('{"status": "failed"}')
    (tmp_path / hang_report.RECORDS_NAME).write_text("a file where a folder is needed")
    process: Any = CONTEXT.Process(target=_stand_still, args=(tmp_path,))
    process.start()
    process.join(100)
    try:
        assert process.exitcode == 6
    finally:
        process.kill()
        process.join()


def test_a_sandbox_without_shared_memory_runs_unwatched(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch, caplog: pytest.LogCaptureFixture
) -> None:
    def refuse(*_: Any) -> None:
        raise PermissionError("not here")

    monkeypatch.setattr(os, "memfd_create", refuse, raising=False)
    os.close(watchdog._shared_file())
    monkeypatch.setattr(tempfile, "TemporaryFile", refuse)
    with Watchdog() as unwatched:
        unwatched.start(tmp_path, 1)
    assert "no watchdog, so a rank that gets stuck does not end: not here" in caplog.text


def test_time_in_a_debugger_does_not_count(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    """Not even right after the debugger has left, before the rank has come to its next sign."""
    states = [("t", True)] * 200 + [("S", False)] * 5
    clock, ended = itertools.count(step=0.5), []
    monkeypatch.setattr(hang_report, "time", SimpleNamespace(monotonic=lambda: next(clock)))
    monkeypatch.setattr(hang_report, "_state", lambda pid: states.pop(0))
    with open(tmp_path / "page", "w+b") as file:
        file.truncate(hang_report.PAGE)
        page = mmap.mmap(file.fileno(), hang_report.PAGE)
        hang_report.SIGN.pack_into(page, 0, 1, False, 3, 1.0, b"compute")
        rank = Rank(str(tmp_path / "a" / "b"), 0, 1, os.getppid(), file.fileno())
        monkeypatch.setattr(rank, "_has_ended", lambda seconds: not states)
        monkeypatch.setattr(rank, "_end_rank", lambda *arguments: ended.append(arguments))
        rank.watch()
    assert not ended and not states


def test_containers_with_the_same_process_ids_do_not_share_a_temporary_file(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    used: list[str] = []
    monkeypatch.setattr(os, "replace", lambda temporary, path: used.append(temporary))
    for host in ("node-0", "node-1"):
        monkeypatch.setattr(hang_report.socket, "gethostname", lambda host=host: host)
        hang_report._write(str(tmp_path / "hang.txt"), "")
    assert len(set(used)) == 2


def sign_of(number: int, phase: str, timeout: float = 100.0) -> Sign:
    return Sign(number, False, 3, timeout, phase)


def silence_of(*spans: tuple[str, float], stopped: bool = False) -> Silence:
    """A rank that gave a sign and then none for so many seconds, in one phase after another."""
    silence = Silence()
    for number, (phase, seconds) in enumerate(spans, start=1):
        for _ in range(int(2 * seconds) + 1):
            silence.add(sign_of(number, phase), 0.5, stopped)
    return silence


@pytest.mark.parametrize(
    ("spans", "ends"),
    [
        ([("compute", 1000)], False),
        ([("compute", 1200)], True),
        ([("compute", 1), ("data", 1), ("compute", 1000)], False),  # a hook that evaluates, say
        ([("compute", 1), ("data", 1), ("compute", 1200)], True),
        ([("compute", 200), ("data", 1), ("compute", 2000)], False),  # slow, but healthy
        ([("compute", 200), ("data", 1), ("compute", 2200)], True),
        ([("compute", 200), ("validation", 1), ("validation", 1200)], True),
        ([("data", 1), ("compute", 1), ("data", 9000)], False),  # a single process waits on
        ([("checkpoint", 1), ("compute", 1), ("checkpoint", 9000)], False),
        ([("startup", 9000)], False),
    ],
)
def test_only_a_silence_far_beyond_the_timeout_and_all_earlier_ones_is_a_hang(
    spans: Sequence[tuple[str, float]], ends: bool
) -> None:
    assert silence_of(*spans).is_hopeless() == ends


def test_a_stopped_process_waits_for_somebody_to_wait_for_it() -> None:
    """Ctrl-Z, and a night later fg, do not end a run whose other ranks are stopped as well."""
    silence = silence_of(("compute", 1), ("data", 1), ("compute", 9999), stopped=True)
    assert not silence.is_hopeless()
    assert silence.is_suspicious()


def test_report_names_the_rank_that_was_late_first(tmp_path: Path) -> None:
    """It is none of those that wait; the ones without a record are named as well."""
    place = str(tmp_path / hang_report.RECORDS_NAME / "1")

    def record(rank: int, step: int, seconds: float, what: str) -> None:
        sign = Sign(1, False, step, 100.0, "compute")
        hang_report.write_record(place, rank, 1, sign, seconds, what, f"stack of {rank}")

    record(0, 6, 100, "waited")
    assert hang_report.merge(place, 5) == "No record of ranks 1, 2, 3, 4, for which others waited"
    record(2, 7, 150, "stuck")
    record(3, 7, 160, "stuck")
    headline = "Rank 3 was late first: stuck after step 7 in the phase compute, without a sign"
    assert hang_report.merge(place, 5).startswith(headline)
    report = (tmp_path / "hang.txt").read_text()
    order = ("stack of 3", "stack of 2", "stack of 0", "No record of rank 1, 4")
    assert sorted(order, key=report.index) == list(order)


def test_a_damaged_record_does_not_replace_the_error_of_the_run(tmp_path: Path) -> None:
    watch = Watchdog(world_size=2)
    watch._place = str(tmp_path / hang_report.RECORDS_NAME / "1")
    hang_report.write_record(watch._place, 0, 1, sign_of(1, "compute"), 100, "waited", "stack")
    (Path(watch._place) / "rank_1.json").write_bytes(bytes(100))
    assert watch.found_hang()
    assert watch.report().startswith("No report of it, as hang.txt cannot be written: ")


STRAGGLER = """
import os, time
from torchtitan.parallel.runner import SPMDRunner

forward_backward = SPMDRunner.forward_backward


def run_slowly(*arguments):
    if os.environ["RANK"] == "1":
        time.sleep(0.3)
    return forward_backward(*arguments)


SPMDRunner.forward_backward = run_slowly
"""


@pytest.mark.fault("F44")
def test_a_slow_rank_is_named_and_trains_on(tmp_path: Path) -> None:
    (tmp_path / "straggler.py").write_text(STRAGGLER)
    path = os.pathsep.join([str(tmp_path), runs.environment()["PYTHONPATH"]])
    env = [rank | {"PYTHONPATH": path} for rank in launcher_variables(2)]
    arguments = ("--job.custom_import=straggler", "--checkpoint.enable=false")
    with ranks_of(tmp_path / "run", [arguments] * 2, env) as ranks:
        (status, output), (second, _) = (rank.end(120) for rank in ranks)
    assert (status, second) == (0, 0), output
    assert "Rank 1 is slow, and all wait for it" in output, output
    assert "Rank 0 is slow" not in output, output
    rows = runs.records(tmp_path / "run")[3:]
    assert min(row["own_seconds/slowest"] for row in rows) >= 0.3
    # Others use the machine as well, so a step or two of the first rank may be slower still.
    named = [row for row in rows if row["slowest_rank"] == 1]
    assert 2 * len(named) > len(rows)
    # The time of the first rank's steps is that of the other, which it waits for.
    waits = [row["step_seconds"] - row["own_seconds/median"] for row in named]
    assert median(waits) > 0.1


def test_a_rank_alone_has_no_times_to_compare(tmp_path: Path) -> None:
    runs.run(tmp_path / "run", "--training.steps=3", "--checkpoint.enable=false")
    assert not [key for row in runs.records(tmp_path / "run") for key in row if "own_" in key]


def test_waits_are_observed_on_gpus_too() -> None:
    """Only to tell ranks that wait from one that is stuck: there are no own times."""
    watch = SimpleNamespace(end=lambda: None)
    world: Any = SimpleNamespace(world_size=2, device=torch.device("cuda"), watchdog=watch)
    times, wait = RankTimes(world, ratio=2.0), dist.Work.wait
    times.open()
    observed = dist.Work.wait
    times.close()
    assert observed is not wait and dist.Work.wait is wait
    assert times.record(1) == {}


def wait_for_each_kind(world: DistributedContext) -> dict[str, float]:
    """Seconds that this rank was seen to wait in each kind of collective; rank 1 comes late."""
    started, seen = [0.0], [0.0]

    def before() -> None:
        started[0] = time.monotonic()

    def after() -> None:
        seen[0] += time.monotonic() - started[0]

    def functional(x: torch.Tensor) -> torch.Tensor:
        return funcol.all_reduce(2 * x, "sum", dist.group.WORLD) + 1

    kinds: dict[str, Callable[[torch.Tensor], Any]] = {
        "plain": dist.all_reduce,
        "functional": functional,
        "compiled": torch.compile(functional, backend="aot_eager"),
    }
    ticks = [0]

    def tick() -> None:
        while ticks[0] >= 0:
            ticks[0] += 1
            time.sleep(0.01)

    threading.Thread(target=tick, daemon=True).start()
    waits = {}
    for name, kind in kinds.items():
        kind(torch.ones(4))  # compiles, connects
        with observe_waits(before, after):
            dist.barrier()
            seen[0] = 0.0
            if world.rank == 1:
                time.sleep(0.5)
            before_it = ticks[0]
            kind(torch.ones(4))
            assert world.rank == 1 or ticks[0] > before_it + 3, "other threads stand still"
        waits[name] = seen[0]
        seen[0] = 0.0
        kind(torch.ones(4))
        assert seen[0] == 0.0, "after the end"
    ticks[0] = -9
    return waits


def test_waits_are_observed_in_each_kind_of_collective(gloo_pool: GlooPool) -> None:
    first, second = gloo_pool.run(2, wait_for_each_kind)
    assert min(first.values()) > 0.3, (first, second)
    assert first.keys() == second.keys()
