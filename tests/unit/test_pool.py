"""The pool of processes itself: what it says of ranks that fail, and what it leaves behind."""

import os
import time
from multiprocessing import forkserver
from pathlib import Path

import pytest
import torch
from torch import distributed as dist
from torch.distributed.tensor import Replicate, Shard, distribute_tensor

from tests.distributed import runs
from tests.forked import CONTEXT, execute
from tests.pool import GlooPool, RankFailure
from torchtitan.distributed.context import DistributedContext


def wait_here() -> None:
    time.sleep(60)


def wait_there() -> None:
    time.sleep(60)


def wait_in_two_places(world: DistributedContext) -> None:
    wait_here() if world.rank == 0 else wait_there()


def test_a_rank_that_does_not_answer_is_asked_where_it_is() -> None:
    pool = GlooPool()
    pool.run(2, count_threads)  # the processes have started
    with pytest.raises(RankFailure) as failure:
        pool.run(2, wait_in_two_places, timeout=5)
    first, second = str(failure.value).split("rank 1:")
    assert "ranks [0, 1] did not answer" in first
    assert "in wait_here" in first and "in wait_there" not in first
    assert "in wait_there" in second and "in wait_here" not in second


def answer_late(world: DistributedContext) -> str:
    return "late"


def test_an_answer_that_is_no_longer_waited_for_is_not_the_next_one(
    monkeypatch: pytest.MonkeyPatch,
) -> None:
    """As after the time-out of a test, which pytest raises while the ranks are at work."""

    def end_test(*given: object, **named: object) -> None:
        raise TimeoutError

    pool = GlooPool()
    with monkeypatch.context() as patched, pytest.raises(TimeoutError):
        patched.setattr("tests.pool.wait", end_test)
        pool.run(1, answer_late)
    assert pool.run(1, count_threads) != ["late"]
    pool.close()


def use_a_mesh(world: DistributedContext, size: int) -> None:
    mesh = dist.init_device_mesh("cpu", (world.world_size, 1), mesh_dim_names=("a", "b"))["a"]
    tensor = distribute_tensor(torch.ones(size, size), mesh, [Shard(0)])
    (tensor @ tensor).redistribute(mesh, [Replicate()])  # DTensor's caches know the mesh
    cycle: list[object] = [mesh]
    cycle.append(cycle)


def count_threads(world: DistributedContext) -> int:
    return len(list(Path(f"/proc/{os.getpid()}/task").iterdir()))


def test_nothing_is_left_of_the_groups_of_earlier_tests(gloo_pool: GlooPool) -> None:
    """Gloo's threads and sockets: after hundreds of tests they were thousands."""
    gloo_pool.run(2, use_a_mesh, 2)
    before = gloo_pool.run(2, count_threads)
    for size in (4, 6, 8):  # DTensor's caches keep what is new to them
        gloo_pool.run(2, use_a_mesh, size)
    assert gloo_pool.run(2, count_threads) == before


def count_groups(world: DistributedContext) -> int:
    dist.new_group()
    return dist.get_pg_count()


def test_a_world_is_kept_for_equal_runs(gloo_pool: GlooPool) -> None:
    def counts(world_size: int, keep: str | None = None) -> set[int]:
        return set(gloo_pool.run(world_size, count_groups, keep=keep))

    assert [counts(2, "a"), counts(2, "a"), counts(2, "a")] == [{2}, {3}, {4}]
    assert [counts(2, "b"), counts(3, "b"), counts(1), counts(2, "b")] == [{2}, {2}, {2}, {2}]
    threads = gloo_pool.run(3, count_threads)
    gloo_pool.run(3, use_a_mesh, 2, keep="c")
    assert gloo_pool.run(3, count_threads) == threads


def preload_something_else(world: DistributedContext) -> list[str]:
    """As in a run: what the program asks for counts."""
    CONTEXT.set_forkserver_preload(["json"])
    return forkserver._forkserver._preload_modules


def test_reading_processes_do_not_take_torch_from_the_ranks(gloo_pool: GlooPool) -> None:
    """They share a fork server, and were often the first to start it."""
    CONTEXT.set_forkserver_preload(["json"])
    assert forkserver._forkserver._preload_modules == ["tests.preloaded"]
    assert gloo_pool.run(1, preload_something_else) == [["json"]]


FRESH = """
import sys
from torchtitan.cli import main

before = set(sys.modules)
status = main(["train", *sys.argv[1:]])
print("FRESH", *(name for name in set(sys.modules) - before if name.startswith("torchtitan")))
sys.exit(status)
"""


def test_a_forked_run_imports_nothing_of_torchtitan_s(tmp_path: Path) -> None:
    """Imports that the fork server leaves to its processes cost each test a part of a second."""
    one_step = ("--training.steps=1", "--lr_scheduler.warmup_steps=0")
    words = runs.command(tmp_path / "run", *one_step)
    at = words.index("-m")
    done = execute([*words[:at], "-c", FRESH, *words[at + 2 :]], runs.environment())
    assert done.returncode == 0, done.stderr
    assert done.stdout.splitlines()[-1] == "FRESH"
