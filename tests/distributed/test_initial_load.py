"""Starting from the checkpoints of other runs and other programs, and what those make of ours."""

from pathlib import Path
from typing import Any

import pytest
import torch
import torch.distributed as dist
import torch.distributed.checkpoint as dcp

from tests.faults.damage import flip
from tests.faults.saving import Trainer, digest, make_store
from tests.pool import GlooPool
from torchtitan.checkpoint.initial_load import InitialLoad
from torchtitan.checkpoint.manager import CheckpointManager
from torchtitan.checkpoint.manifest import RunState
from torchtitan.checkpoint.state import model_tensors, optimizer_tensors
from torchtitan.checkpoint.store import CheckpointStore
from torchtitan.config import CheckpointError
from torchtitan.config.schema import Checkpoint
from torchtitan.distributed.context import DistributedContext

STATE = {
    "step": 2,
    "num_tokens_seen": 7,
    "lane_states": {"0": {"at": 3}},
    "data_fingerprint": "f",
}


def save_run(world: DistributedContext, folder: str, model_only: bool = False) -> dict[str, str]:
    """Two steps; returns the content of model and optimizer."""
    trainer = Trainer(world)
    for step in (1, 2):
        trainer.train_step(step)
    tensors = model_tensors([trainer.model]) if model_only else trainer.tensors()
    make_store(world, folder).save(2, tensors, STATE, model_only=model_only)
    return trainer.content()


def save_elsewhere(world: DistributedContext, folder: str, how: str) -> dict[str, str]:
    """As programs in TorchTitan's style save: nested or flat, whole or the model alone."""
    trainer = Trainer(world)
    trainer.train_step(1)
    model: dict[str, Any] = model_tensors([trainer.model])
    if how == "bfloat16":
        model = {name: tensor.to(torch.bfloat16) for name, tensor in model.items()}
    optimizer = {
        "state": optimizer_tensors([trainer.model], [trainer.optimizer]),
        "param_groups": [{"lr": 0.1, "params": ["0.weight"]}],
    }
    rest = {
        "optimizer": optimizer,
        "lr_scheduler": {"last_epoch": 1},
        "dataloader": {"dp_rank_0": {"a", "set"}},
        "train_state": {"step": torch.tensor(1), "losses": [1.5]},
    }
    state = {
        "nested": {"model": model, **rest},
        "flat": {**model, **rest},
        "derived": {**model, "freqs_cis": torch.ones(3, dtype=torch.complex64)},
        "more": {**model, "2.weight": torch.zeros(3)},
    }.get(how, model)
    dcp.save(state, checkpoint_id=folder, process_group=world.control_group)
    return {name: digest(tensor.float()) for name, tensor in model.items()}


def start(
    world: DistributedContext, path: str, cut: str, section: dict[str, Any]
) -> dict[str, Any]:
    """Load into a fresh model, as a new run does."""
    trainer = Trainer(world, seed=9, cut=cut)
    before = trainer.content()
    model = model_tensors([trainer.model])
    optimizer = optimizer_tensors([trainer.model], [trainer.optimizer])
    try:
        initial = InitialLoad(Checkpoint(initial_load_path=path, **section), world)
        initial.load(model, optimizer)
    except CheckpointError as error:
        return {"error": str(error), "untouched": trainer.content() == before}
    return {"before": before, "content": trainer.content(), "state": initial.state}


def parts(content: dict[str, str], optimizer: bool) -> dict[str, str]:
    return {k: v for k, v in content.items() if k.startswith("optimizer.") == optimizer}


@pytest.mark.parametrize("world_size, cut", [(1, "shard"), (2, "copy"), (4, "tensor")])
def test_weights_of_another_run(
    gloo_pool: GlooPool, tmp_path: Path, world_size: int, cut: str
) -> None:
    saved = gloo_pool.run(2, save_run, str(tmp_path))[0]
    for result in gloo_pool.run(world_size, start, str(tmp_path / "step-2"), cut, {}):
        assert parts(result["content"], False) == parts(saved, False)
        assert parts(result["content"], True) == parts(result["before"], True)
        assert result["state"] == {}


def test_everything_of_another_run(gloo_pool: GlooPool, tmp_path: Path) -> None:
    saved = gloo_pool.run(2, save_run, str(tmp_path))[0]
    path, section = str(tmp_path / "step-2"), {"initial_load_model_only": False}
    result = gloo_pool.run(4, start, path, "shard", section)[0]
    assert (result["content"], result["state"]) == (saved, STATE)
    section["exclude_from_loading"] = ("optimizer", "lr_scheduler", "train_state")
    result = gloo_pool.run(1, start, path, "shard", section)[0]
    assert parts(result["content"], False) == parts(saved, False)
    assert parts(result["content"], True) == parts(result["before"], True)
    assert result["state"] == {"lane_states": {"0": {"at": 3}}, "data_fingerprint": "f"}


@pytest.mark.parametrize("how", ["nested", "flat", "derived", "model"])
def test_weights_of_another_program(gloo_pool: GlooPool, tmp_path: Path, how: str) -> None:
    """Whatever lies beside them is left alone, also what would have to be unpickled."""
    saved = gloo_pool.run(2, save_elsewhere, str(tmp_path / "w"), how)[0]
    assert saved
    for world_size in (1, 4):
        result = gloo_pool.run(world_size, start, str(tmp_path / "w"), "shard", {})[0]
        assert parts(result["content"], False) == saved


def test_weights_are_converted(gloo_pool: GlooPool, tmp_path: Path) -> None:
    """As when a run starts from weights that were exported in 16 bits."""
    gloo_pool.run(2, save_elsewhere, str(tmp_path / "w"), "bfloat16")
    assert gloo_pool.run(2, weights_of, str(tmp_path / "w")) == [True, True]


def weights_of(world: DistributedContext, path: str) -> bool:
    trainer = Trainer(world, seed=9)
    saved = {name: tensor.to(torch.bfloat16) for name, tensor in _trained(world).items()}
    model = model_tensors([trainer.model])
    InitialLoad(Checkpoint(initial_load_path=path), world).load(model, {})
    whole = {name: tensor.full_tensor() for name, tensor in model.items()}
    return all(
        whole[name].dtype == torch.float32
        and torch.equal(whole[name], saved[name].full_tensor().float())
        for name in saved
    )


def _trained(world: DistributedContext) -> dict[str, Any]:
    trainer = Trainer(world)
    trainer.train_step(1)
    return model_tensors([trainer.model])


def test_misfits_and_damage_are_refused_untouched(gloo_pool: GlooPool, tmp_path: Path) -> None:
    gloo_pool.run(2, save_elsewhere, str(tmp_path / "more"), "more")
    cut_off = tmp_path / "cut-off"
    gloo_pool.run(2, save_elsewhere, str(cut_off), "flat")
    shard = cut_off / "__1_0.distcp"
    shard.write_bytes(shard.read_bytes()[:-40])
    gloo_pool.run(2, save_run, str(tmp_path / "run"))
    flip("__1_0.distcp", 0.5)(tmp_path / "run" / "step-2")
    cases = {
        "more": "2.weight is only in it",
        "cut-off": "lies beyond the end of __1_0.distcp",
        "run/step-2": "content differs from what was written",
    }
    for name, text in cases.items():
        results = gloo_pool.run(2, start, str(tmp_path / name), "shard", {})
        assert results[0] == results[1]
        assert results[0]["untouched"] and text in results[0]["error"]


class Canary:
    """Leaves a file behind where it is unpickled."""

    def __init__(self, path: Path):
        self.path = path

    def __reduce__(self) -> Any:
        return open, (str(self.path), "w")


@pytest.mark.fault("F57")
def test_nothing_in_foreign_weights_runs(gloo_pool: GlooPool, tmp_path: Path) -> None:
    saved = gloo_pool.run(1, plant_canary, str(tmp_path))[0]
    (tmp_path / "canary").unlink()  # saving plants it, too
    result = gloo_pool.run(1, start, str(tmp_path / "w"), "shard", {})[0]
    assert parts(result["content"], False) == saved
    assert not (tmp_path / "canary").exists()


def plant_canary(world: DistributedContext, folder: str) -> dict[str, str]:
    model = _trained(world)
    canary = Canary(Path(folder) / "canary")
    state = {"model": model, "train_state": canary}
    dcp.save(state, checkpoint_id=f"{folder}/w", process_group=world.control_group)
    canary.path.touch()
    return {name: digest(tensor) for name, tensor in model.items()}


# --- the manager ----------------------------------------------------------------------------------


def save_last(
    world: DistributedContext, folder: str, section: dict[str, Any]
) -> dict[str, list[Any]]:
    """The last save of a run; types and norms of what was saved, as stock torch reads them."""
    settings = Checkpoint(enable=True, **section)
    trainer = Trainer(world)
    trainer.train_step(1)
    store = CheckpointStore(settings, Path(folder), world, {"run_id": "a"})
    with CheckpointManager(settings, store, world) as manager:
        assert manager.is_due(1, last=True)
        manager.save(RunState(1), {0: {}}, [trainer.model], [trainer.optimizer], True, True)
        assert manager.saved_step == 1
    dist.barrier()
    step = Path(folder) / "step-1"
    entries = dcp.FileSystemReader(step).read_metadata().state_dict_metadata
    tensors = {
        name: torch.zeros(entry.size, dtype=entry.properties.dtype)  # type: ignore[union-attr]
        for name, entry in entries.items()
    }
    dcp.load(tensors, checkpoint_id=step, process_group=world.control_group)
    return {
        name: [str(tensor.dtype), float(tensor.float().norm())] for name, tensor in tensors.items()
    }


def test_last_save_is_exported(gloo_pool: GlooPool, tmp_path: Path) -> None:
    as_is = {"last_save_model_only": True}
    whole = gloo_pool.run(2, save_last, str(tmp_path / "a"), as_is)[0]
    half = gloo_pool.run(2, save_last, str(tmp_path / "b"), {**as_is, "export_dtype": "bfloat16"})
    assert set(whole) == set(half[0]) == {"0.weight", "0.bias", "1.weight"}
    for name, (dtype, norm) in whole.items():
        assert (dtype, half[0][name][0]) == ("torch.float32", "torch.bfloat16")
        assert half[0][name][1] == pytest.approx(norm, rel=0.01)
        assert norm > 0


def due_steps(world: DistributedContext, folder: str, section: dict[str, Any]) -> list[int]:
    settings = Checkpoint(enable=True, interval=4, **section)
    store = CheckpointStore(settings, Path(folder), world, {"run_id": "a"})
    manager = CheckpointManager(settings, store, world)
    return [step for step in range(1, 11) if manager.is_due(step, last=step == 10)]


@pytest.mark.parametrize(
    ("section", "expected"),
    [
        ({}, [4, 8, 10]),
        ({"enable_first_step_checkpoint": True}, [1, 4, 8, 10]),
        ({"load_only": True}, []),
    ],
)
def test_when_to_save(
    gloo_pool: GlooPool, tmp_path: Path, section: dict[str, Any], expected: list[int]
) -> None:
    assert gloo_pool.run(1, due_steps, str(tmp_path), section) == [expected]
