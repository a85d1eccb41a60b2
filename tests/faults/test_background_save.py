"""Saves beside training: the same bits as without, never two at a time, and no failure is lost."""

import logging
import os
import signal
import sys
import threading
import time
from datetime import timedelta
from pathlib import Path
from typing import Any
from unittest import mock

import pytest
import torch

from tests.faults.saving import Trainer, make_store, note, noted, recover
from tests.pool import GlooPool, RankFailure
from torchtitan.checkpoint import async_save, disk_space
from torchtitan.checkpoint import store as store_module
from torchtitan.checkpoint.async_save import SaveThread, Staging
from torchtitan.config import CheckpointError, ConfigError
from torchtitan.distributed.context import DistributedContext
from torchtitan.training.ending import Progress, after_error
from torchtitan.utils.torch_compat import set_group_timeouts

MODES = ["async", "async_with_pinned_mem"]


class Gate:
    """Holds a save at a site until it is opened."""

    def __init__(self, site: str, step: int):
        self._place = (site, step)
        self._open = threading.Event()
        self.reached = threading.Event()

    def __call__(self, site: str, step: int) -> None:
        if (site, step) == self._place:
            self.reached.set()
            assert self._open.wait(60), "nobody opened the gate"

    def open(self) -> None:
        self._open.set()


@pytest.mark.skipif(sys.platform != "linux", reason="threads have no priorities of their own")
def test_training_comes_first() -> None:
    """The thread that saves gets what training leaves, and training keeps its priority."""
    seen = []
    thread = SaveThread()
    thread.start(1, lambda: seen.append(os.getpriority(os.PRIO_PROCESS, 0)))
    thread.wait()
    assert seen == [10]
    assert os.getpriority(os.PRIO_PROCESS, 0) < 10


@pytest.mark.skipif(sys.platform != "linux", reason="threads have no priorities of their own")
def test_a_run_of_low_priority_is_saved_with_that() -> None:
    """To raise it to that of other saves is refused to most users, and the save was lost."""
    seen = []

    def save() -> None:
        os.setpriority(os.PRIO_PROCESS, threading.get_native_id(), 15)  # as of `nice -n 15`
        thread = SaveThread()
        thread.start(1, lambda: seen.append(os.getpriority(os.PRIO_PROCESS, 0)))
        thread.wait()

    run = threading.Thread(target=save)
    run.start()
    run.join()
    assert seen == [15]


def train_on_while_saving(
    world: DistributedContext, folder: str, mode: str, cut: str
) -> dict[str, str]:
    """Step 1 is saved, and step 2 after it, each while two more steps change every tensor."""
    trainer = Trainer(world, cut=cut)
    for saved in (1, 3):
        gate = Gate("ckpt.begin", saved)
        if saved == 1:
            store = make_store(world, folder, async_mode=mode)
        store.on_site = gate
        trainer.train_step(saved)
        content = trainer.content()
        store.save(saved, trainer.tensors(), {"step": saved})
        store.wait_for_staging()
        assert gate.reached.wait(60)
        for step in (saved + 1, saved + 2):
            trainer.train_step(step)  # collectives, beside those of the save
        assert saved not in store.steps()
        assert store.saved_step != saved, "told before it was committed"
        gate.open()
        world.watchdog.sign("compute")
        store.wait()
        assert world.watchdog._phase == "checkpoint", "a long wait would count as a hang"
        assert store.saved_step == saved
    assert trainer.content() != content
    return content


@pytest.mark.fault("F49")
@pytest.mark.parametrize("world_size, cut", [(1, "shard"), (2, "shard"), (4, "tensor")])
@pytest.mark.parametrize("mode", MODES)
def test_what_is_saved_is_the_step(
    gloo_pool: GlooPool, tmp_path: Path, mode: str, world_size: int, cut: str
) -> None:
    """Not what training makes of it while it is written."""
    content = gloo_pool.run(world_size, train_on_while_saving, str(tmp_path), mode, cut)[0]
    result = gloo_pool.run(1, recover, str(tmp_path))[0]
    assert (result["step"], result["steps"]) == (3, [1, 3])
    assert result["content"] == content


def save_both_ways(world: DistributedContext, folder: str) -> None:
    trainer = Trainer(world)
    trainer.train_step(1)
    for mode in ("disabled", *MODES):
        store = make_store(world, f"{folder}/{mode}", async_mode=mode)
        store.save(1, trainer.tensors(), {"step": 1})
        store.wait()


def test_files_are_the_same(gloo_pool: GlooPool, tmp_path: Path) -> None:
    gloo_pool.run(2, save_both_ways, str(tmp_path))
    shards = [
        [(tmp_path / mode / "step-1" / f"__{rank}_0.distcp").read_bytes() for rank in (0, 1)]
        for mode in ("disabled", *MODES)
    ]
    assert shards[1] == shards[0] and shards[2] == shards[0]
    assert len(shards[0][0]) > 100


def test_copies_share_nothing_and_kept_memory_is_used_again() -> None:
    original = torch.arange(6.0).view(2, 3).t()  # not contiguous, as a cut matrix may be
    for pinned in (False, True):
        staging = Staging(pinned)
        first = staging.start({"a": original})["a"]
        assert torch.equal(first, original)
        assert first.data_ptr() != original.data_ptr()
        second = staging.start({"a": original + 1})["a"]
        assert torch.equal(second, original + 1)
        assert (second.data_ptr() == first.data_ptr()) is pinned
        third = staging.start({"a": original.double()})["a"]
        assert third.dtype == torch.float64


def open_when_waited_for(thread: Any, gate: Gate) -> None:
    real = thread.join

    def join() -> None:
        gate.open()
        real()

    thread.join = join


def save_three(
    world: DistributedContext, folder: str
) -> tuple[list[tuple[str, int]], list[str], list[int]]:
    """Without waiting in between, the first one being held until the second is waiting for it."""
    events: list[tuple[str, int]] = []
    gate = Gate("ckpt.hashed", 1)

    def on_site(site: str, step: int) -> None:
        events.append((site, step))
        gate(site, step)

    messages: list[str] = []

    class Keep(logging.Handler):
        def emit(self, record: logging.LogRecord) -> None:
            messages.append(record.getMessage())

    logger = logging.getLogger("torchtitan.checkpoint.async_save")
    logger.addHandler(handler := Keep())
    logger.setLevel(logging.INFO)
    trainer = Trainer(world)
    store = make_store(world, folder, on_site=on_site, async_mode="async", keep_latest_k=2)
    worth_a_line = async_save._LOGGED_WAIT_SECONDS
    async_save._LOGGED_WAIT_SECONDS = 0.0
    try:
        for step in (1, 2, 3):
            trainer.train_step(step)
            store.save(step, trainer.tensors(), {})
            if step == 1:
                open_when_waited_for(store._thread._thread, gate)
        store.wait()
    finally:
        async_save._LOGGED_WAIT_SECONDS = worth_a_line
        logger.removeHandler(handler)
    world.barrier()  # rank 0 deletes what is older after the others have gone on
    return events, messages, store.steps()


def test_never_two_at_a_time(gloo_pool: GlooPool, tmp_path: Path) -> None:
    for events, messages, steps in gloo_pool.run(2, save_three, str(tmp_path)):
        assert [step for _, step in events] == sorted(step for _, step in events)
        assert {step for _, step in events} == {1, 2, 3}
        assert any("Waited " in text and "of step 1, which" in text for text in messages)
        assert set(steps) == {2, 3}


def fail_in_the_background(world: DistributedContext, folder: str, how: str) -> list[Any]:
    """Rank 1 cannot write step 2. What all ranks see of it, and whether the next save works."""
    store = make_store(world, folder, async_mode="async", keep_latest_k=2)
    trainer = Trainer(world)
    real = store_module.record_file

    def break_down(path: Path) -> Any:
        raise OSError(5, "Input/output error", str(path))

    for step in (1, 2):
        trainer.train_step(step)
        if step == 2 and world.rank == 1:
            store_module.record_file = break_down
        store.save(step, trainer.tensors(), {})
        if step == 1:
            store.wait()
    try:
        if how == "wait":
            store.wait()
        else:
            store.save(3, trainer.tensors(), {}, blocking=how == "last save")
        message = "no error"
    except CheckpointError as error:
        message = str(error)
    finally:
        store_module.record_file = real
    seen = [message, store.save_failed, store.saved_step, store.steps()]
    world.barrier()
    store.save(4, trainer.tensors(), {})
    store.wait()
    return [*seen, store.steps(), sorted(path.name for path in Path(folder).iterdir())]


@pytest.mark.fault("F08")
@pytest.mark.parametrize("how", ["wait", "next save", "last save"])
def test_failure_is_told_on_all_ranks(gloo_pool: GlooPool, tmp_path: Path, how: str) -> None:
    """Once; nothing is committed, nothing older deleted, and the next save works."""
    first, second = gloo_pool.run(2, fail_in_the_background, str(tmp_path), how)
    assert first == second
    message, failed, saved_step, steps, later, names = first
    assert message.startswith("the checkpoint of step 2 was not saved: rank 1: ")
    assert "Input/output error" in message
    assert (failed, saved_step, steps) == (False, 1, [1])
    assert later == [1, 4]
    assert names == ["step-1", "step-4"]


def see_a_failure_coming(world: DistributedContext, folder: str) -> bool:
    """Without waiting: this is what the ranks exchange at every step."""

    def on_site(site: str, step: int) -> None:
        if site == "ckpt.begin":
            raise RuntimeError("before anything was agreed")

    store = make_store(world, folder, on_site=on_site, async_mode="async")
    store.save(1, Trainer(world).tensors(), {})
    store._thread._thread.join()
    assert store.save_failed
    with pytest.raises(CheckpointError, match="step 1 was not saved: RuntimeError: before"):
        store.wait()
    return store.save_failed


@pytest.mark.fault("F08")
def test_failure_is_seen_without_waiting(gloo_pool: GlooPool, tmp_path: Path) -> None:
    assert gloo_pool.run(2, see_a_failure_coming, str(tmp_path)) == [False, False]


def save_beside_and_die(world: DistributedContext, folder: str, site: str, victim: int) -> None:
    """Train on while steps are saved; this process dies at `site` of step 3."""

    def on_site(name: str, step: int) -> None:
        if (name, step, world.rank) == (site, 3, victim):
            os.kill(os.getpid(), signal.SIGKILL)

    trainer = Trainer(world)
    store = make_store(world, folder, on_site=on_site, keep_latest_k=2, async_mode="async")
    contents, told = {}, 0
    for step in range(1, 200):
        trainer.train_step(step)
        if step <= 3:
            contents[step] = trainer.content()
            if world.is_main:
                note(folder, "content", step, contents[step])
            store.save(step, trainer.tensors(), {"step": step})
        if world.is_main and store.saved_step > told:
            told = store.saved_step
            note(folder, "told", told, contents[told])
    store.wait()


@pytest.mark.fault("F03", "F05")
@pytest.mark.parametrize(
    "site, victim",
    [
        ("ckpt.begin", 1),
        ("ckpt.shard_written", 1),
        ("ckpt.hashed", 0),
        ("ckpt.manifest", 0),
        ("ckpt.rename", 0),
        ("ckpt.after_commit", 1),
        ("purge.begin", 0),
    ],
)
def test_killed_while_saving_beside_training(
    gloo_pool: GlooPool, tmp_path: Path, site: str, victim: int
) -> None:
    with pytest.raises(RankFailure, match=r"died|failed"):
        gloo_pool.run(2, save_beside_and_die, str(tmp_path), site, victim)
    result = gloo_pool.run(2, recover, str(tmp_path))[0]
    assert result["step"] == (3 if site in ("ckpt.after_commit", "purge.begin") else 2)
    assert result["content"] == noted(tmp_path, "content")[result["step"]]
    assert result["step"] >= max(noted(tmp_path, "told"), default=0)
    assert not list(tmp_path.glob(".tmp-*"))


def save_slowly_with_short_patience(world: DistributedContext, folder: str) -> list[int]:
    """Rank 1 writes for longer than a step may take, as rank 0 finds out with a collective that
    nobody joins."""
    patience_seconds, is_over, waiting = 0.3, Path(folder, "is-over"), threading.Event()

    def on_site(site: str, step: int) -> None:
        if site == "ckpt.hashed":
            waiting.set()
        while site == "ckpt.shard_written" and world.rank == 1 and not is_over.exists():
            time.sleep(0.01)

    tensors = Trainer(world).tensors()
    store = make_store(world, folder, on_site=on_site, async_mode="async")
    set_group_timeouts(timedelta(seconds=patience_seconds))
    store.save(1, tensors, {})
    if world.is_main:
        waiting.wait()
        time.sleep(patience_seconds)
        with pytest.raises(RuntimeError, match=r"[Tt]imed out"):
            world.barrier()
        is_over.touch()
    store.wait()
    return store.steps()


def test_saving_has_a_time_limit_of_its_own(gloo_pool: GlooPool, tmp_path: Path) -> None:
    assert gloo_pool.run(2, save_slowly_with_short_patience, str(tmp_path)) == [[1], [1]]


def save_while_rank_1_hangs(world: DistributedContext, folder: str) -> int | None:
    """The exit status of this rank."""
    is_over = Path(folder, "is-over")

    def on_site(site: str, step: int) -> None:
        while site == "ckpt.shard_written" and world.rank == 1 and not is_over.exists():
            time.sleep(0.01)

    tensors = Trainer(world).tensors()
    store = make_store(world, folder, on_site=on_site, async_mode="async", save_timeout_seconds=0.3)
    store.save(1, tensors, {})
    try:
        with pytest.raises(CheckpointError, match="step 1 was not saved: RuntimeError") as caught:
            store.wait()
    finally:
        is_over.touch(exist_ok=True)
    run_folder = mock.Mock(**{"keeps_status.return_value": True})
    ending = after_error(caught.value, world.rank, None, run_folder, Progress(), 1)
    return ending and ending.code


def test_a_save_that_hangs_is_a_hang(gloo_pool: GlooPool, tmp_path: Path) -> None:
    """Although the error is of a checkpoint: exit status 6 for the rank that waited."""
    assert gloo_pool.run(2, save_while_rank_1_hangs, str(tmp_path))[0] == 6


def need_memory(world: DistributedContext, folder: str, mode: str) -> str:
    real = disk_space.available_bytes
    disk_space.available_bytes = lambda: 100
    try:
        make_store(world, folder, async_mode=mode).require_space(Trainer(world).tensors())
    except ConfigError as error:
        return str(error)
    finally:
        disk_space.available_bytes = real
    return "enough"


def test_memory_for_copies_is_looked_for(gloo_pool: GlooPool, tmp_path: Path) -> None:
    for message in gloo_pool.run(2, need_memory, str(tmp_path), "async"):
        assert message.startswith('checkpoint.async_mode = "async": needs ')
        assert "of host memory on " in message
    assert gloo_pool.run(2, need_memory, str(tmp_path), "disabled") == ["enough"] * 2
