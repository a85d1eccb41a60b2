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

import pytest
import torch

from tests.faults.saving import Trainer, make_checkpointer, note, noted, recover
from tests.pool import GlooPool, RankFailure
from torchtitan.checkpoint import background as background_module
from torchtitan.checkpoint import commit as commit_module
from torchtitan.checkpoint.staging import Staging
from torchtitan.config import CheckpointError, ConfigError
from torchtitan.distributed.context import DistributedContext
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
    background = background_module.Background()
    background.start(1, lambda: seen.append(os.getpriority(os.PRIO_PROCESS, 0)))
    background.wait()
    assert seen == [10]
    assert os.getpriority(os.PRIO_PROCESS, 0) < 10


@pytest.mark.skipif(sys.platform != "linux", reason="threads have no priorities of their own")
def test_a_run_of_low_priority_is_saved_with_that() -> None:
    """To raise it to that of other saves is refused to most users, and the save was lost."""
    seen = []

    def save() -> None:
        os.setpriority(os.PRIO_PROCESS, threading.get_native_id(), 15)  # as of `nice -n 15`
        background = background_module.Background()
        background.start(1, lambda: seen.append(os.getpriority(os.PRIO_PROCESS, 0)))
        background.wait()

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
            checkpointer = make_checkpointer(world, folder, async_mode=mode)
        checkpointer._commit.on_site = gate
        trainer.train_step(saved)
        content = trainer.content()
        checkpointer.save(saved, trainer.tensors(), {"step": saved})
        checkpointer.wait_for_staging()
        assert gate.reached.wait(60)
        for step in (saved + 1, saved + 2):
            trainer.train_step(step)  # collectives, beside those of the save
        assert saved not in checkpointer.steps()
        assert checkpointer.saved_step != saved, "told before it was committed"
        gate.open()
        checkpointer.wait()
        assert checkpointer.saved_step == saved
    assert trainer.content() != content
    return content


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
        checkpointer = make_checkpointer(world, f"{folder}/{mode}", async_mode=mode)
        checkpointer.save(1, trainer.tensors(), {"step": 1})
        checkpointer.wait()


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

    logger = logging.getLogger("torchtitan.checkpoint.background")
    logger.addHandler(handler := Keep())
    logger.setLevel(logging.INFO)
    trainer = Trainer(world)
    checkpointer = make_checkpointer(
        world, folder, on_site=on_site, async_mode="async", keep_latest_k=2
    )
    worth_a_line = background_module._WORTH_A_LINE_SECONDS
    background_module._WORTH_A_LINE_SECONDS = 0.0
    try:
        for step in (1, 2, 3):
            trainer.train_step(step)
            checkpointer.save(step, trainer.tensors(), {})
            if step == 1:
                open_when_waited_for(checkpointer._background._thread, gate)
        checkpointer.wait()
    finally:
        background_module._WORTH_A_LINE_SECONDS = worth_a_line
        logger.removeHandler(handler)
    world.barrier()  # rank 0 deletes what is older after the others have gone on
    return events, messages, checkpointer.steps()


def test_never_two_at_a_time(gloo_pool: GlooPool, tmp_path: Path) -> None:
    for events, messages, steps in gloo_pool.run(2, save_three, str(tmp_path)):
        assert [step for _, step in events] == sorted(step for _, step in events)
        assert {step for _, step in events} == {1, 2, 3}
        assert any("Waited " in text and "of step 1, which" in text for text in messages)
        assert set(steps) == {2, 3}


def fail_in_the_background(world: DistributedContext, folder: str, how: str) -> list[Any]:
    """Rank 1 cannot write step 2. What all ranks see of it, and whether the next save works."""
    checkpointer = make_checkpointer(world, folder, async_mode="async", keep_latest_k=2)
    trainer = Trainer(world)
    real = commit_module.record_file

    def break_down(path: Path) -> Any:
        raise OSError(5, "Input/output error", str(path))

    for step in (1, 2):
        trainer.train_step(step)
        if step == 2 and world.rank == 1:
            commit_module.record_file = break_down
        checkpointer.save(step, trainer.tensors(), {})
        if step == 1:
            checkpointer.wait()
    try:
        if how == "wait":
            checkpointer.wait()
        else:
            checkpointer.save(3, trainer.tensors(), {}, blocking=how == "last save")
        message = "no error"
    except CheckpointError as error:
        message = str(error)
    finally:
        commit_module.record_file = real
    seen = [message, checkpointer.save_failed, checkpointer.saved_step, checkpointer.steps()]
    world.barrier()
    checkpointer.save(4, trainer.tensors(), {})
    checkpointer.wait()
    return [*seen, checkpointer.steps(), sorted(path.name for path in Path(folder).iterdir())]


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

    checkpointer = make_checkpointer(world, folder, on_site=on_site, async_mode="async")
    checkpointer.save(1, Trainer(world).tensors(), {})
    checkpointer._background._thread.join()
    assert checkpointer.save_failed
    with pytest.raises(CheckpointError, match="step 1 was not saved: RuntimeError: before"):
        checkpointer.wait()
    return checkpointer.save_failed


def test_failure_is_seen_without_waiting(gloo_pool: GlooPool, tmp_path: Path) -> None:
    assert gloo_pool.run(2, see_a_failure_coming, str(tmp_path)) == [False, False]


def save_beside_and_die(world: DistributedContext, folder: str, site: str, victim: int) -> None:
    """Train on while steps are saved; this process dies at `site` of step 3."""

    def on_site(name: str, step: int) -> None:
        if (name, step, world.rank) == (site, 3, victim):
            os.kill(os.getpid(), signal.SIGKILL)

    trainer = Trainer(world)
    checkpointer = make_checkpointer(
        world, folder, on_site=on_site, keep_latest_k=2, async_mode="async"
    )
    contents, told = {}, 0
    for step in range(1, 200):
        trainer.train_step(step)
        if step <= 3:
            contents[step] = trainer.content()
            if world.is_main:
                note(folder, "content", step, contents[step])
            checkpointer.save(step, trainer.tensors(), {"step": step})
        if world.is_main and checkpointer.saved_step > told:
            told = checkpointer.saved_step
            note(folder, "told", told, contents[told])
    checkpointer.wait()


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
    checkpointer = make_checkpointer(world, folder, on_site=on_site, async_mode="async")
    set_group_timeouts(timedelta(seconds=patience_seconds))
    checkpointer.save(1, tensors, {})
    if world.is_main:
        waiting.wait()
        time.sleep(patience_seconds)
        with pytest.raises(RuntimeError, match=r"[Tt]imed out"):
            world.barrier()
        is_over.touch()
    checkpointer.wait()
    return checkpointer.steps()


def test_saving_has_a_time_limit_of_its_own(gloo_pool: GlooPool, tmp_path: Path) -> None:
    assert gloo_pool.run(2, save_slowly_with_short_patience, str(tmp_path)) == [[1], [1]]


def need_memory(world: DistributedContext, folder: str, mode: str) -> str:
    from torchtitan.checkpoint import checkpointer as module

    real = module.available_bytes
    module.available_bytes = lambda: 100
    try:
        make_checkpointer(world, folder, async_mode=mode).require_space(Trainer(world).tensors())
    except ConfigError as error:
        return str(error)
    finally:
        module.available_bytes = real
    return "enough"


def test_memory_for_copies_is_looked_for(gloo_pool: GlooPool, tmp_path: Path) -> None:
    for message in gloo_pool.run(2, need_memory, str(tmp_path), "async"):
        assert message.startswith('checkpoint.async_mode = "async": needs ')
        assert "of host memory on " in message
    assert gloo_pool.run(2, need_memory, str(tmp_path), "disabled") == ["enough"] * 2
