"""Checkpoints across meshes, to the bit; which steps stay, which is taken, which is refused."""

import math
from pathlib import Path
from typing import Any
from unittest import mock

import pytest
import torch
from torch import nn

from tests.faults.saving import Trainer, find, make_store, recover, save_steps
from tests.pool import GlooPool, RankFailure
from torchtitan.checkpoint.disk_space import SPACE_FACTOR, FreeSpace
from torchtitan.checkpoint.manager import CheckpointManager
from torchtitan.checkpoint.state import model_tensors, optimizer_tensors
from torchtitan.config import CheckpointError, ConfigError
from torchtitan.distributed.context import DistributedContext

MESHES = [(1, "shard"), (2, "shard"), (4, "shard"), (4, "hybrid"), (2, "copy")]
# 5 rows over 2 ranks and these over 2 again: each rank has 2 or 1 that do not follow the placement
# before, and the file has to say which.
CUT_TWICE = (4, "tensor")
LEGS = [
    *((before, after) for before in MESHES for after in MESHES if before != after),
    *((CUT_TWICE, (1, "shard")), ((4, "shard"), CUT_TWICE), ((2, "tensor"), CUT_TWICE)),
]


def run_leg(
    world: DistributedContext, folder: str, cut: str, start: int, stop: int
) -> dict[str, str]:
    """Go on from step `start` (0: from nothing) to `stop`, and save there."""
    trainer, store = (
        Trainer(world, 0 if start == 0 else 5, cut),
        make_store(world, folder),
    )
    found = find(store)
    assert (found.step if found else 0) == start
    if found:
        store.load(found, trainer.tensors())
    for step in range(start + 1, stop + 1):
        trainer.train_step(step)
    store.save(stop, trainer.tensors(), {})
    return trainer.content()


def load_content(world: DistributedContext, folder: str, cut: str) -> dict[str, str]:
    trainer, store = Trainer(world, 5, cut), make_store(world, folder)
    found = find(store)
    assert found is not None
    store.load(found, trainer.tensors())
    return trainer.content()


@pytest.mark.fault("F30")
@pytest.mark.parametrize("before, after", LEGS, ids=lambda mesh: f"{mesh[0]}-{mesh[1]}")
def test_other_mesh_same_bits(
    gloo_pool: GlooPool, tmp_path: Path, before: tuple[int, str], after: tuple[int, str]
) -> None:
    saved = gloo_pool.run(before[0], run_leg, str(tmp_path), before[1], 0, 2)
    loaded = gloo_pool.run(after[0], load_content, str(tmp_path), after[1])
    assert all(content == saved[0] for content in [*saved, *loaded])


@pytest.mark.fault("F30", "F32")
def test_chain_of_resumes_is_one_run(gloo_pool: GlooPool, tmp_path: Path) -> None:
    """The optimizer's step count and moments come along, through three meshes."""
    whole = gloo_pool.run(1, run_leg, str(tmp_path / "whole"), "shard", 0, 6)[0]
    gloo_pool.run(1, run_leg, str(tmp_path / "parts"), "shard", 0, 2)
    gloo_pool.run(2, run_leg, str(tmp_path / "parts"), "copy", 2, 4)
    last = gloo_pool.run(2, run_leg, str(tmp_path / "parts"), "shard", 4, 6)[0]
    assert last == whole


def save_stage(world: DistributedContext, folder: str) -> None:
    """Every rank holds another layer, as pipeline stages do."""
    torch.manual_seed(0)
    layers = [nn.Linear(3, 3) for _ in range(world.world_size)]
    stage = nn.ModuleDict({str(world.rank): layers[world.rank]})
    optimizer = torch.optim.AdamW(stage.parameters())
    tensors = {**model_tensors([stage]), **optimizer_tensors([stage], [optimizer])}
    make_store(world, folder).save(1, tensors, {"rank": world.rank})


def load_stages(world: DistributedContext, folder: str, layers: int) -> tuple[list[float], Any]:
    parts = [
        nn.ModuleDict({str(index): nn.Linear(3, 3)})
        for index in range(layers)
        if index % world.world_size == world.rank
    ]
    optimizers = [torch.optim.AdamW(part.parameters()) for part in parts]
    tensors = {**model_tensors(parts), **optimizer_tensors(parts, optimizers)}
    store = make_store(world, folder)
    found = find(store)
    assert found is not None
    state = store.load(found, tensors)
    return [float(tensors[name].sum()) for name in sorted(tensors) if "weight" in name], state


def test_ranks_may_hold_different_tensors(gloo_pool: GlooPool, tmp_path: Path) -> None:
    gloo_pool.run(4, save_stage, str(tmp_path))
    whole, state = gloo_pool.run(1, load_stages, str(tmp_path), 4)[0]
    assert state == {"rank": 0}
    halves = gloo_pool.run(2, load_stages, str(tmp_path), 4)
    assert sorted(whole) == sorted([*halves[0][0], *halves[1][0]])
    assert len(set(whole)) > 4


def load_into_stages(world: DistributedContext, folder: str, layers: int) -> str:
    with pytest.raises(CheckpointError) as caught:
        load_stages(world, folder, layers)
    return str(caught.value)


def test_what_a_stage_lacks_or_has_beside_is_told(gloo_pool: GlooPool, tmp_path: Path) -> None:
    """Also to the ranks of other stages, whose own tensors all fit."""
    gloo_pool.run(4, save_stage, str(tmp_path))
    for message in gloo_pool.run(2, load_into_stages, str(tmp_path), 3):
        assert "3.weight is only in it; " in message
    for message in gloo_pool.run(2, load_into_stages, str(tmp_path), 5):
        assert "4.weight is not in it; " in message


# --- what does not fit ----------------------------------------------------------------------------


def load_changed(world: DistributedContext, folder: str, change: str) -> tuple[str, bool]:
    trainer = Trainer(world, 5)
    tensors = trainer.tensors()
    if change == f"dtype on rank {world.rank}":
        tensors["0.weight"] = tensors["0.weight"].to(torch.bfloat16)
    elif change == "shape":
        tensors["1.weight"] = torch.zeros(3, 6)
    elif change == "missing":
        tensors["2.weight"] = torch.zeros(3)
    elif change == "extra":
        del tensors["optimizer.0.bias.exp_avg"]
    before = trainer.content()
    store = make_store(world, folder)
    found = find(store)
    assert found is not None
    try:
        store.load(found, tensors)
    except CheckpointError as error:
        return str(error), trainer.content() == before
    return "", False


@pytest.mark.parametrize(
    "change, text",
    [
        ("dtype on rank 0", "0.weight is float32 [5, 7] in it, bfloat16 [5, 7] in the run"),
        ("dtype on rank 1", "0.weight is float32 [5, 7] in it, bfloat16 [5, 7] in the run"),
        ("shape", "1.weight is float32 [3, 5] in it, float32 [3, 6] in the run"),
        ("missing", "2.weight is not in it"),
        ("extra", "optimizer.0.bias.exp_avg is only in it"),
    ],
)
def test_misfit_is_refused_untouched(
    gloo_pool: GlooPool, tmp_path: Path, change: str, text: str
) -> None:
    """DCP alone ignores extra names, casts types, and notices the rest half-way."""
    gloo_pool.run(2, save_steps, str(tmp_path), 1)
    for message, untouched in gloo_pool.run(2, load_changed, str(tmp_path), change):
        assert text in message
        assert untouched


def save_model_only(world: DistributedContext, folder: str) -> list[str]:
    trainer, store = Trainer(world), make_store(world, folder)
    model = model_tensors([trainer.model])
    store.save(3, model, {}, model_only=True)
    found = find(store)
    assert found is not None and found.manifest.model_only
    store.load(found, model)
    with pytest.raises(CheckpointError) as caught:
        store.load(found, trainer.tensors())
    return [str(caught.value)]


def test_model_only(gloo_pool: GlooPool, tmp_path: Path) -> None:
    for (message,) in gloo_pool.run(2, save_model_only, str(tmp_path)):
        assert "holds the model only" in message
    assert gloo_pool.run(1, recover, str(tmp_path))[0]["untouched"]


# --- which steps stay -----------------------------------------------------------------------------


def resume_and_save(
    world: DistributedContext, folder: str, load_step: int, steps: int, section: Any
) -> list[int]:
    trainer = Trainer(world)
    store = make_store(world, folder, load_step=load_step, **section)
    manager = CheckpointManager(store.section, store, world)
    found = manager.found
    assert found is not None
    store.load(found, trainer.tensors())
    manager.begin()
    for step in range(found.step + 1, found.step + steps + 1):
        trainer.train_step(step)
        store.save(step, trainer.tensors(), {})
    return store.steps()


def test_retention(gloo_pool: GlooPool, tmp_path: Path) -> None:
    """The newest stay, and the step resumed from as long as the job that resumed from it runs."""
    keep_two = {"keep_latest_k": 2}
    gloo_pool.run(1, save_steps, str(tmp_path), 4, keep_two)
    assert sorted(path.name for path in tmp_path.iterdir()) == ["step-3", "step-4"]
    assert gloo_pool.run(1, resume_and_save, str(tmp_path), -1, 4, keep_two)[0] == [4, 7, 8]
    assert gloo_pool.run(1, resume_and_save, str(tmp_path), -1, 1, keep_two)[0] == [8, 9]
    keep_all = {"keep_latest_k": 0}
    assert gloo_pool.run(1, resume_and_save, str(tmp_path), -1, 2, keep_all)[0] == [8, 9, 10, 11]


@pytest.mark.fault("F11")
def test_rewind(gloo_pool: GlooPool, tmp_path: Path) -> None:
    """Going back needs to be allowed, and moves the later steps aside instead of deleting them."""
    gloo_pool.run(2, save_steps, str(tmp_path), 5)
    error = gloo_pool.run(2, recover, str(tmp_path), 2)[0]["error"]
    assert "step-5 is later" in error and "checkpoint.allow_rewind" in error
    section = {"allow_rewind": True, "keep_latest_k": 2}
    assert gloo_pool.run(2, resume_and_save, str(tmp_path), 2, 1, section)[0] == [2, 3]
    rewound = sorted(path.name.rsplit("-", 1)[0] for path in tmp_path.glob("rewound-*"))
    assert rewound == ["rewound-step-3", "rewound-step-4", "rewound-step-5"]


def save_at(world: DistributedContext, folder: str, steps: tuple[int, ...]) -> list[int]:
    trainer = Trainer(world)
    store = make_store(world, folder, keep_latest_k=2)
    for step in steps:
        store.save(step, trainer.tensors(), {})
    return store.steps()


@pytest.mark.fault("F11")
def test_later_steps_are_neither_counted_nor_deleted(gloo_pool: GlooPool, tmp_path: Path) -> None:
    gloo_pool.run(1, save_at, str(tmp_path), (80, 90))
    assert gloo_pool.run(1, save_at, str(tmp_path), (10, 11, 12))[0] == [11, 12, 80, 90]


# --- the folder -----------------------------------------------------------------------------------


def open_in_own_folder(world: DistributedContext, folder: str) -> str:
    from torchtitan.checkpoint import store as module

    module._SHARED_WAIT_SECONDS = 0.3
    own = Path(folder) / str(world.rank)
    own.mkdir()
    with pytest.raises(CheckpointError) as caught:
        make_store(world, str(own))
    return str(caught.value)


def test_machines_without_a_shared_folder(gloo_pool: GlooPool, tmp_path: Path) -> None:
    for message in gloo_pool.run(2, open_in_own_folder, str(tmp_path)):
        assert "rank 1" in message and "all machines share" in message
    assert not list((tmp_path / "0").iterdir())


def need_space(world: DistributedContext, folder: str, room: tuple[int, int | None]) -> str:
    trainer, store = Trainer(world), make_store(world, folder)
    store.require_space(trainer.tensors())
    with mock.patch("torchtitan.checkpoint.disk_space.free_space", return_value=FreeSpace(*room)):
        with pytest.raises(ConfigError) as caught:
            store.require_space(trainer.tensors())
        lenient = make_store(world, folder, allow_low_disk=True)
        with mock.patch("torchtitan.checkpoint.disk_space.logger.warning") as warning:
            lenient.require_space(trainer.tensors())
    told = [str(call.args[1]) for call in warning.call_args_list]
    assert told == [str(caught.value)] * world.is_main
    return str(caught.value)


@pytest.mark.parametrize(
    ("room", "words"),
    [
        ((500, None), "bytes for the next checkpoint, 500 bytes are"),
        ((10**15, 9), "has room for 9"),
    ],
)
def test_space_is_looked_for_at_the_start(
    gloo_pool: GlooPool, tmp_path: Path, room: tuple[int, int | None], words: str
) -> None:
    for message in gloo_pool.run(2, need_space, str(tmp_path), room):
        assert message.startswith("checkpoint.folder = ") and words in message


def need_space_for_stages(world: DistributedContext, folder: str, spare: int) -> None:
    """Two stages on two ranks each, of 40 and of 12 bytes."""
    stage = {"0": torch.zeros(10)} if world.rank < 2 else {"1": torch.zeros(3)}
    store = make_store(world, folder)
    room = FreeSpace(math.ceil(SPACE_FACTOR * 52) + spare, None)
    with mock.patch("torchtitan.checkpoint.disk_space.free_space", return_value=room):
        store.require_space(stage)


def test_space_counts_each_tensor_once(gloo_pool: GlooPool, tmp_path: Path) -> None:
    gloo_pool.run(4, need_space_for_stages, str(tmp_path), 0)
    with pytest.raises(RankFailure, match="62 bytes are free"):
        gloo_pool.run(4, need_space_for_stages, str(tmp_path), -1)


def test_folder_that_anybody_may_write_to(gloo_pool: GlooPool, tmp_path: Path) -> None:
    gloo_pool.run(2, save_steps, str(tmp_path), 1)
    tmp_path.chmod(0o777)
    results = gloo_pool.run(2, recover, str(tmp_path))
    assert "checkpoint.trust_path" in results[1]["error"]
    trusting = gloo_pool.run(2, recover, str(tmp_path), -1, {"trust_path": True})
    assert trusting[0]["step"] == 1
