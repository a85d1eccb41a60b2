"""Saves that fail for reasons of the file system: nothing is lost, and the next one works."""

import os
import shutil
import subprocess
from collections.abc import Iterator
from contextlib import contextmanager
from pathlib import Path

import pytest

from tests.faults.saving import Trainer, make_store, recover
from tests.pool import GlooPool
from torchtitan.checkpoint import store as store_module
from torchtitan.checkpoint.store import CheckpointStore
from torchtitan.config import CheckpointError
from torchtitan.distributed.context import DistributedContext

FAIL = "the checkpoint of step {} was not saved: rank {}: "


def error_of(store: CheckpointStore, step: int, trainer: Trainer) -> str:
    """Save a step, which must fail."""
    with pytest.raises(CheckpointError) as caught:
        store.save(step, trainer.tensors(), {"step": step})
        store.wait()
    return str(caught.value)


def fail_twice(
    world: DistributedContext, folder: str, mode: str
) -> tuple[list[str], dict[str, str]]:
    """Save steps 1 and 2, fail at 3 and 4; the messages, and the content of step 2."""
    trainer = Trainer(world)
    store = make_store(world, folder, keep_latest_k=2, async_mode=mode)
    for step in (1, 2):
        trainer.train_step(step)
        store.save(step, trainer.tensors(), {"step": step})
        store.wait()
    content, real = trainer.content(), store_module.record_file

    def break_down(path: Path) -> None:
        raise OSError(5, "Input/output error", str(path))

    if world.rank == 1:
        store_module.record_file = break_down  # type: ignore[assignment]
    try:
        messages = []
        for step in (3, 4):
            trainer.train_step(step)
            messages.append(error_of(store, step, trainer))
    finally:
        store_module.record_file = real
    return messages, content


def save_one(world: DistributedContext, folder: str, step: int) -> list[int]:
    trainer, store = Trainer(world), make_store(world, folder, keep_latest_k=2)
    store.save(step, trainer.tensors(), {"step": step})
    return store.steps()


@pytest.mark.fault("F08", "F09")
@pytest.mark.parametrize("mode", ["disabled", "async"])
def test_two_failures_in_a_row_cost_no_good_step(
    gloo_pool: GlooPool, tmp_path: Path, mode: str
) -> None:
    """Failed saves do not count for retention, which keeps two."""
    first, second = gloo_pool.run(2, fail_twice, str(tmp_path), mode)
    assert first == second
    messages, content = first
    for step, message in zip((3, 4), messages, strict=True):
        assert message.startswith(FAIL.format(step, 1)) and "Input/output error" in message
    assert sorted(path.name for path in tmp_path.iterdir()) == ["step-1", "step-2"]
    found = gloo_pool.run(2, recover, str(tmp_path))[0]
    assert (found["step"], found["content"]) == (2, content)
    assert gloo_pool.run(2, save_one, str(tmp_path), 5) == [[2, 5]] * 2


@contextmanager
def broken(world: DistributedContext, folder: Path, how: str) -> Iterator[None]:
    """Make the folder unusable for all ranks, and mend it."""
    aside = folder.with_name("aside")
    if world.is_main and how in ("deleted", "file"):
        shutil.move(folder, aside)
        if how == "file":
            folder.touch()
    if world.is_main and how == "forbidden" and os.geteuid():
        folder.chmod(0o500)
    world.barrier()
    if how == "forbidden" and not os.geteuid():  # root may write anywhere
        os.seteuid(65534)
    try:
        yield
    finally:
        if os.geteuid() == 65534:
            os.seteuid(0)
        world.barrier()
        if aside.exists() and world.is_main:
            folder.unlink(missing_ok=True)
            shutil.move(aside, folder)
        if world.is_main:
            folder.chmod(0o700)
        world.barrier()


def save_into_nothing(
    world: DistributedContext, folder: str, how: str, mode: str
) -> tuple[str, list[int]]:
    """Save step 1, then 2 and 3 while and after the folder is broken."""
    trainer, path = Trainer(world), Path(folder)
    store = make_store(world, folder, async_mode=mode)
    store.save(1, trainer.tensors(), {"step": 1})
    store.wait()
    with broken(world, path, how):
        message = error_of(store, 2, trainer)
    store.save(3, trainer.tensors(), {"step": 3})
    store.wait()
    return message, store.steps()


@pytest.mark.fault("F21")
@pytest.mark.parametrize("mode", ["disabled", "async"])
@pytest.mark.parametrize(
    ("how", "text"),
    [
        ("deleted", "No such file or directory"),
        ("file", "Not a directory"),
        ("forbidden", "Permission denied"),
    ],
)
def test_a_folder_that_becomes_unusable_is_named(
    gloo_pool: GlooPool, tmp_path: Path, how: str, text: str, mode: str
) -> None:
    folder = tmp_path / "checkpoint"
    for message, steps in gloo_pool.run(2, save_into_nothing, str(folder), how, mode):
        assert message.startswith(FAIL.format(2, 0))
        assert f"{text}: '{folder}" in message
        assert steps == [1, 3]


@pytest.fixture
def small_disk(tmp_path: Path) -> Iterator[Path]:
    """A file system of 512 KiB."""
    folder = tmp_path / "disk"
    folder.mkdir()
    words = ["mount", "-t", "tmpfs", "-o", "size=512k,mode=700", "tmpfs", str(folder)]
    try:
        mounted = subprocess.run(words, capture_output=True).returncode == 0
    except FileNotFoundError:
        mounted = False
    if not mounted:
        pytest.skip("needs the right to mount a file system")
    try:
        yield folder
    finally:
        subprocess.run(["umount", str(folder)], check=True)


def fill_the_disk(world: DistributedContext, folder: str) -> tuple[str, list[int], list[int]]:
    """Save step 1, fail at step 2, save step 2 when the space is there again."""
    trainer, ballast = Trainer(world), Path(folder, "ballast")
    store = make_store(world, f"{folder}/checkpoint")
    store.save(1, trainer.tensors(), {"step": 1})
    if world.is_main:
        with pytest.raises(OSError, match="No space left"), ballast.open("wb", 0) as file:
            while file.write(bytes(4096)):
                pass
    world.barrier()
    message, steps = error_of(store, 2, trainer), store.steps()
    world.barrier()
    ballast.unlink(missing_ok=True)
    world.barrier()
    store.save(2, trainer.tensors(), {"step": 2})
    return message, steps, store.steps()


@pytest.mark.fault("F18")
def test_a_disk_that_is_full_and_then_is_not(gloo_pool: GlooPool, small_disk: Path) -> None:
    first, second = gloo_pool.run(2, fill_the_disk, str(small_disk))
    assert first == second
    message, steps, later = first
    assert message.startswith("the checkpoint of step 2 was not saved: rank ")
    assert "No space left on device" in message
    assert (steps, later) == ([1], [1, 2])
    found = gloo_pool.run(2, recover, str(small_disk / "checkpoint"))[0]
    assert (found["step"], found["steps"]) == (2, [1, 2])
