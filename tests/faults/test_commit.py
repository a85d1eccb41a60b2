"""A checkpoint is whole or absent, and damage is noticed before it does any.

Processes are really killed and files really damaged; what a restarted job then makes of the folder
is compared, to the bit, with what was saved.
"""

import os
import resource
import shutil
import signal
import threading
from collections.abc import Callable, Iterator
from pathlib import Path
from typing import Any
from unittest import mock

import pytest
import torch
import torch.distributed.checkpoint as dcp

from tests.faults.damage import DAMAGES, flip, resign
from tests.faults.saving import (
    Trainer,
    find,
    make_store,
    noted,
    recover,
    save_and_die,
    save_steps,
)
from tests.pool import GlooPool, RankFailure
from torchtitan.checkpoint import dcp_io, steps_folder
from torchtitan.checkpoint.dcp_io import StepWriter
from torchtitan.config import CheckpointError
from torchtitan.distributed.context import DistributedContext

SITES = [
    "ckpt.begin",
    "ckpt.shard_written",
    "ckpt.hashed",
    "ckpt.manifest",
    "ckpt.rename",
    "ckpt.after_commit",
    "purge.begin",
]
MAIN_ONLY = ("ckpt.manifest", "ckpt.rename", "purge.begin")
KILLS = [(site, rank) for site in SITES for rank in (0, 1) if rank == 0 or site not in MAIN_ONLY]


@pytest.mark.fault("F03", "F54")
@pytest.mark.parametrize("site, victim", KILLS)
def test_killed_while_saving(gloo_pool: GlooPool, tmp_path: Path, site: str, victim: int) -> None:
    with pytest.raises(RankFailure, match=r"died|failed"):
        gloo_pool.run(2, save_and_die, str(tmp_path), site, victim)
    result = gloo_pool.run(2, recover, str(tmp_path))[0]
    committed = site in ("ckpt.after_commit", "purge.begin")
    assert result["step"] == (3 if committed else 2)
    acknowledged = noted(tmp_path, "ack")
    assert result["step"] >= max(acknowledged)
    if result["step"] in acknowledged:
        assert result["content"] == acknowledged[result["step"]]
    assert not list(tmp_path.glob(".tmp-*")), "leftovers are removed by the next start"


def die_while_deleting(world: DistributedContext, folder: str) -> None:
    real = shutil.rmtree

    def delete_some(path: Any, *args: Any, **kwargs: Any) -> None:
        if ".trash-" in str(path):
            next(Path(path).glob("*.distcp")).unlink()
            os.kill(os.getpid(), signal.SIGKILL)
        real(path, *args, **kwargs)

    steps_folder.shutil.rmtree = delete_some  # type: ignore[assignment]
    save_steps(world, folder, 3, {"keep_latest_k": 2})


@pytest.mark.fault("F10")
def test_killed_while_deleting(gloo_pool: GlooPool, tmp_path: Path) -> None:
    with pytest.raises(RankFailure, match=r"died|failed"):
        gloo_pool.run(2, die_while_deleting, str(tmp_path))
    assert list(tmp_path.glob(".trash-*"))
    result = gloo_pool.run(2, recover, str(tmp_path))[0]
    assert (result["step"], result["steps"]) == (3, [2, 3])
    assert not list(tmp_path.glob(".trash-*"))


# --- damage ---------------------------------------------------------------------------------------


@pytest.fixture(scope="module")
def saved(
    gloo_pool: GlooPool, tmp_path_factory: pytest.TempPathFactory
) -> Iterator[tuple[Path, dict[int, dict[str, str]]]]:
    """Steps 1 to 3, saved by two ranks, and their contents."""
    folder = tmp_path_factory.mktemp("saved")
    yield folder, gloo_pool.run(2, save_steps, str(folder), 3)[0]


@pytest.mark.fault("F22", "F23", "F24", "F25", "F26", "F57")
@pytest.mark.parametrize("damage", DAMAGES.values(), ids=DAMAGES.keys())
def test_damaged_step_is_left_out(
    gloo_pool: GlooPool, tmp_path: Path, saved: Any, damage: Callable[[Path], object]
) -> None:
    folder = tmp_path / "checkpoint"
    shutil.copytree(saved[0], folder)
    damage(folder / "step-3")
    results = gloo_pool.run(2, recover, str(folder))
    for result in results:
        assert result["step"] == 2
        assert result["content"] == saved[1][2]
        assert result["state"] == {"step": 2, "lanes": {"0": [1, 2.5, None]}}
    assert not (folder / "canary").exists()
    assert not (folder / "step-3").exists()
    assert len(list(folder.glob("quarantine-step-3-*"))) == 1
    # What was wrong is out of the way: the run saves step 3 again and finds it.
    again = gloo_pool.run(1, save_steps, str(folder), 3)[0]
    assert gloo_pool.run(2, recover, str(folder))[0]["content"] == again[3]


def test_undamaged_step_is_taken(gloo_pool: GlooPool, tmp_path: Path, saved: Any) -> None:
    shutil.copytree(saved[0], tmp_path / "checkpoint")
    (tmp_path / "checkpoint" / "step-3" / "NOTES.txt").write_text("a good one")
    result = gloo_pool.run(2, recover, str(tmp_path / "checkpoint"))[0]
    assert (result["step"], result["content"]) == (3, saved[1][3])


@pytest.mark.fault("F22", "F27")
def test_all_damaged_is_an_error(gloo_pool: GlooPool, tmp_path: Path, saved: Any) -> None:
    folder = tmp_path / "checkpoint"
    shutil.copytree(saved[0], folder)
    for step in (1, 2, 3):
        flip("__1_0.distcp", 0.3)(folder / f"step-{step}")
    results = gloo_pool.run(2, recover, str(folder))
    assert results[0] == results[1]
    assert results[0]["untouched"]
    for text in ("step-1", "step-2", "step-3", "job.new_run"):
        assert text in results[0]["error"]
    # Nor are they moved: without steps, the next start would begin from scratch.
    assert sorted(path.name for path in folder.iterdir()) == ["step-1", "step-2", "step-3"]


@pytest.mark.fault("F23")
def test_wanted_step_damaged_is_an_error(gloo_pool: GlooPool, tmp_path: Path, saved: Any) -> None:
    """Another step than the one that was asked for is never taken silently."""
    folder = tmp_path / "checkpoint"
    shutil.copytree(saved[0], folder)
    flip("__0_0.distcp", 0.3)(folder / "step-3")
    error = gloo_pool.run(2, recover, str(folder), 3)[0]["error"]
    assert "step-3/__0_0.distcp" in error
    assert (folder / "step-3").exists()
    assert "no step-9" in gloo_pool.run(2, recover, str(folder), 9)[0]["error"]


def test_foreign_run_is_an_error(gloo_pool: GlooPool, tmp_path: Path, saved: Any) -> None:
    shutil.copytree(saved[0], tmp_path / "checkpoint")
    resign(tmp_path / "checkpoint" / "step-2", run_id="other")
    error = gloo_pool.run(2, recover, str(tmp_path / "checkpoint"))[0]["error"]
    assert "step-2 is of run other" in error


@pytest.mark.fault("F12", "F54")
def test_stray_names_are_left_alone(gloo_pool: GlooPool, tmp_path: Path, saved: Any) -> None:
    folder = tmp_path / "checkpoint"
    shutil.copytree(saved[0], folder)
    target = tmp_path / "target"
    shutil.copytree(folder / "step-3", target)
    for name in (
        "step-5.bak",
        "step-7-tmp",
        "xstep-6",
        "step-0x1",
        "step-04",
        ".tmp-step-8-other-00",
    ):
        shutil.copytree(folder / "step-3", folder / name)
    (folder / "step-9").write_text("a file")
    (folder / "step-11").symlink_to(target)
    names = {path.name for path in folder.iterdir()}
    result = gloo_pool.run(2, recover, str(folder))[0]
    assert (result["step"], result["steps"]) == (3, [1, 2, 3])
    gloo_pool.run(2, save_steps, str(folder), 4, {"keep_latest_k": 2})
    assert {path.name for path in folder.iterdir()} == names - {"step-1", "step-2"} | {"step-4"}
    assert sorted(path.name for path in target.iterdir()) == sorted(
        path.name for path in (folder / "step-3").iterdir()
    )


# --- saves that fail ------------------------------------------------------------------------------


def save_under_a_limit(world: DistributedContext, folder: str) -> list[str]:
    """Rank 1 may write files of 1,000 bytes."""
    trainer, store = Trainer(world), make_store(world, folder)
    store.save(1, trainer.tensors(), {})
    limits = resource.getrlimit(resource.RLIMIT_FSIZE)
    if world.rank == 1:
        resource.setrlimit(resource.RLIMIT_FSIZE, (1000, limits[1]))
    messages = []
    try:
        store.save(2, trainer.tensors(), {})
    except CheckpointError as error:
        messages.append(str(error))
    finally:
        resource.setrlimit(resource.RLIMIT_FSIZE, limits)
    names = sorted(path.name for path in Path(folder).iterdir())
    world.barrier()
    store.save(2, trainer.tensors(), {})
    return [*messages, *names, str(store.steps())]


@pytest.mark.fault("F19", "F48")
def test_what_the_file_system_refuses_is_named(gloo_pool: GlooPool, tmp_path: Path) -> None:
    """Every rank gets the error of the rank that failed, and not torch's; the next save works."""
    results = gloo_pool.run(2, save_under_a_limit, str(tmp_path))
    assert results[0][0] == results[1][0]
    assert "step 2 was not saved: rank 1: [Errno 27] File too large: " in results[0][0]
    assert "__1_0.distcp" in results[0][0]
    assert results[0][1:] == ["step-1", "[1, 2]"]


class FullDisk(StepWriter):
    """Every file of tensors is the device that is always full."""

    def __init__(self, path: Path):
        super().__init__(path)
        real = self.fs.concat_path
        self.fs.concat_path = (  # type: ignore[method-assign]
            lambda path, suffix: "/dev/full" if suffix.endswith(".distcp") else real(path, suffix)
        )


def save_on_full_disk(world: DistributedContext, folder: str) -> str:
    store = make_store(world, folder)
    full = mock.patch("torchtitan.checkpoint.store.StepWriter", FullDisk)
    with full, pytest.raises(CheckpointError) as caught:
        store.save(2, Trainer(world).tensors(), {})
    return str(caught.value)


@pytest.mark.fault("F18")
def test_a_full_disk_is_named(gloo_pool: GlooPool, tmp_path: Path) -> None:
    for message in gloo_pool.run(2, save_on_full_disk, str(tmp_path)):
        assert "step 2 was not saved: rank 0: [Errno 28] No space left on device: " in message
        assert "iB are free: '/dev/full'" in message


class LossyWriter(dcp.FileSystemWriter):
    """Several threads, and a disk that fails all but the main one."""

    def __init__(self, path: Path):
        super().__init__(path, thread_count=4, sync_files=False)
        real = self.fs.create_stream

        def fail_in_helpers(name: Any, mode: str) -> Any:
            if threading.current_thread() is not threading.main_thread():
                raise OSError(28, "No space left on device")
            return real(name, mode)

        self.fs.create_stream = fail_in_helpers  # type: ignore[method-assign]


def save_with_lossy_writer(world: DistributedContext, folder: str) -> str:
    from torchtitan.checkpoint import store as module

    threading.excepthook = lambda args: None
    real, module.StepWriter = module.StepWriter, LossyWriter  # type: ignore[misc, assignment]
    try:
        save_steps(world, folder, 1)
    except CheckpointError as error:
        return str(error)
    finally:
        module.StepWriter = real  # type: ignore[misc]
        threading.excepthook = threading.__excepthook__
    return "saved"


@pytest.mark.fault("F20")
def test_data_lost_in_a_thread_is_noticed(gloo_pool: GlooPool, tmp_path: Path) -> None:
    """DCP reports success there."""
    for message in gloo_pool.run(2, save_with_lossy_writer, str(tmp_path)):
        assert "was not written" in message
    assert not list(tmp_path.iterdir())


def record_order(world: DistributedContext, folder: str) -> list[str]:
    """Save one step; what was synced and renamed, in order."""
    events: list[str] = []
    real_fsync, real_rename = os.fsync, os.rename

    def fsync(descriptor: int) -> None:
        events.append("sync " + os.path.basename(os.readlink(f"/proc/self/fd/{descriptor}")))
        real_fsync(descriptor)

    def rename(source: Any, target: Any) -> None:
        events.append("rename " + os.path.basename(target))
        real_rename(source, target)

    os.fsync, os.rename = fsync, rename  # type: ignore[assignment]
    try:
        save_steps(world, folder, 1)
    finally:
        os.fsync, os.rename = real_fsync, real_rename
    return events


@pytest.mark.fault("F55")
def test_files_are_synced_before_the_rename(gloo_pool: GlooPool, tmp_path: Path) -> None:
    main, other = gloo_pool.run(2, record_order, str(tmp_path))
    commit = main.index("rename step-1")
    before = set(main[:commit])
    assert {"sync __0_0.distcp", "sync .metadata", "sync manifest.json"} <= before
    assert main[commit - 1].startswith("sync .tmp-step-1-")
    assert main[commit + 1] == f"sync {tmp_path.name}"
    assert other == ["sync __1_0.distcp"]


def save_twice(world: DistributedContext, folder: str) -> tuple[dict[str, str], list[int]]:
    trainer, store = Trainer(world), make_store(world, folder)
    store.save(1, trainer.tensors(), {})
    first = trainer.content()
    trainer.train_step(1)
    store.save(1, trainer.tensors(), {})
    return first, store.steps()


@pytest.mark.fault("F29")
def test_a_saved_step_is_not_overwritten(gloo_pool: GlooPool, tmp_path: Path) -> None:
    first, steps = gloo_pool.run(2, save_twice, str(tmp_path))[0]
    assert steps == [1]
    assert gloo_pool.run(2, recover, str(tmp_path))[0]["content"] == first


def find_with_blind_rank(world: DistributedContext, folder: str) -> Any:
    store = make_store(world, folder)
    real = os.scandir
    if world.rank == 1:
        os.scandir = lambda *args: iter(())  # type: ignore[assignment]
    try:
        found = find(store)
    finally:
        os.scandir = real
    return found and found.step


@pytest.mark.fault("F28")
def test_rank_0_decides(gloo_pool: GlooPool, tmp_path: Path, saved: Any) -> None:
    """File systems may show other ranks an old listing."""
    shutil.copytree(saved[0], tmp_path / "checkpoint")
    assert gloo_pool.run(2, find_with_blind_rank, str(tmp_path / "checkpoint")) == [3, 3]


def test_stock_readers_read_a_step(saved: Any, tmp_path: Path) -> None:
    """What a step folder holds is no secret format."""
    from torch.distributed.checkpoint.format_utils import dcp_to_torch_save

    step = saved[0] / "step-3"
    described = dcp_io.read_metadata(step).state_dict_metadata
    tensors = {name: torch.zeros(entry.size) for name, entry in described.items()}  # type: ignore[union-attr]
    with pytest.warns(UserWarning, match="single process"):
        dcp.load(tensors, checkpoint_id=step, no_dist=True)
    dcp_to_torch_save(step, tmp_path / "all.pt")
    plain = torch.load(tmp_path / "all.pt", weights_only=True)  # noqa: TID251 (the format under test)
    assert set(plain) == set(tensors)
    for name, tensor in tensors.items():
        assert torch.equal(tensor, plain[name])
        if not name.endswith(".step"):
            assert tensor.abs().sum() > 0
