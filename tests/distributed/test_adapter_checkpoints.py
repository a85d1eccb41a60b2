"""Checkpoints of adapters hold what is trained, refer to the base, and move between meshes."""

import shutil
from dataclasses import dataclass, field
from functools import partial
from pathlib import Path
from typing import Any

import pytest

from tests.distributed import tiny
from tests.distributed.tiny import VOCAB_SIZE, Case
from tests.faults.saving import digest, make_store
from tests.foreign import random_weights, write_hf
from tests.parity.adapted import ADAPTED, kind_of
from tests.parity.table import row
from tests.pool import GlooPool
from torchtitan.checkpoint.manager import CheckpointManager
from torchtitan.checkpoint.manifest import BASE_STATE, RunState, read_manifest
from torchtitan.checkpoint.state import model_tensors, optimizer_tensors
from torchtitan.config import CheckpointError
from torchtitan.config.run_context import RunContext
from torchtitan.config.schema import Checkpoint
from torchtitan.distributed.context import DistributedContext
from torchtitan.distributed.parallel_dims import ParallelDims
from torchtitan.loss.cross_entropy import CrossEntropyLoss
from torchtitan.models.decoder.args import DecoderArgs
from torchtitan.models.registry import get_family
from torchtitan.optim.optimizer import build_optimizers
from torchtitan.parallel.grad_clip import clip_gradients, gradient_norm
from torchtitan.training import builder, model_builder
from torchtitan.weights.source import open_weights

ONE, FSDP_TP = ADAPTED[0], ADAPTED[9]
DROPPED = {"handlers": ONE.settings["handlers"], "model": {"handlers": ["lora"]}}
PIPELINE = row(DROPPED, pp=2, schedule="1F1B")
TENSOR = row(DROPPED, tp=2)


@dataclass
class Leg:
    """What one rank knows of a part of a run."""

    losses: list[float] = field(default_factory=list)
    loaded: dict[str, str] = field(default_factory=dict)
    """Digests of whole tensors at the start."""
    content: dict[str, str] = field(default_factory=dict)
    """The same at the end."""
    error: str = ""


def train(world: DistributedContext, case: Case, folder: str, base: str, last: int) -> Leg:
    """Go on from what `folder` holds, or from `base`, to step `last`, and save it."""
    config = case.config()
    context = RunContext(config, world.world_size, "cpu")
    dims = ParallelDims.from_section(config.parallelism, context.world_size)
    mesh = tiny.mesh_of(world, dims)
    family = get_family("llama3")
    args = family.resolve(config.model, VOCAB_SIZE)
    foreign = partial(open_weights, family=family, args=args)
    section, leg = Checkpoint(enable=True, initial_load_path=base), Leg()
    store = make_store(world, folder)
    store._info["config"] = config.model_dump(mode="json")
    try:
        manager = CheckpointManager(section, store, world, open_foreign=foreign)
        model = model_builder.build_model(
            config, VOCAB_SIZE, mesh, dims, world.device, initialise=not manager.loads
        )
        optimizers = build_optimizers(
            config.optimizer, model.parts, world.device, model.parameter_names
        )
        builder.load(manager, model, optimizers)
    except CheckpointError as error:
        leg.error = str(error)
        return leg

    def digests() -> dict[str, str]:
        tensors = model_tensors(model.parts) | optimizer_tensors(model.parts, optimizers)
        return {name: digest(tensor) for name, tensor in tensors.items()}

    leg.loaded = digests()
    runner = builder.build_runner(config, model, mesh, dims, world.device)
    batches = tiny.microbatches_of(case, dims, world.rank)
    num_targets = int(CrossEntropyLoss().count(tiny.sequences()))
    for step in range(manager.state.step + 1, last + 1):
        runner.streams.step = step
        leg.losses.append(runner.forward_backward(batches, num_targets).item())
        norm = gradient_norm(model.parameters, dims.ranks_per_stage, model.uncounted)
        clip_gradients(model.parameters, norm, tiny.MAX_NORM)
        for optimizer in optimizers:
            optimizer.step()
            optimizer.zero_grad()
    if leg.losses:
        manager.save(RunState(last), {}, model.parts, optimizers, finished=False, last=True)
    leg.content = digests()
    return leg


def on(pool: GlooPool, case: Case, folder: Path, base: Path, last: int) -> list[Leg]:
    """Run `train` on all ranks of the case's mesh."""
    return pool.run(case.world_size, train, case, str(folder), str(base), last)


@pytest.fixture(scope="module")
def base(tmp_path_factory: pytest.TempPathFactory) -> Path:
    """A Hugging Face folder of the tiny model."""
    folder = tmp_path_factory.mktemp("base") / "hf"
    args = get_family("llama3").resolve(ONE.config().model, VOCAB_SIZE)
    assert isinstance(args, DecoderArgs)
    weights = random_weights(args)
    write_hf(folder, {name: w * (0.1 if w.dim() == 2 else 1) for name, w in weights.items()}, args)
    return folder


@pytest.fixture(scope="module")
def alone(gloo_pool: GlooPool, base: Path, tmp_path_factory: pytest.TempPathFactory) -> list[float]:
    """The losses of one process that is not interrupted."""
    [leg] = on(gloo_pool, ONE, tmp_path_factory.mktemp("alone"), base, 6)
    return leg.losses


def whole(legs: list[Leg], name: str) -> dict[str, str]:
    tensors: dict[str, str] = {}
    for leg in legs:
        tensors |= getattr(leg, name)
    return tensors


def test_a_run_moves_over_meshes(
    gloo_pool: GlooPool, base: Path, alone: list[float], tmp_path: Path
) -> None:
    losses, before = [], None
    for case, last in ((TENSOR, 2), (PIPELINE, 4), (FSDP_TP, 6)):
        legs = on(gloo_pool, case, tmp_path, base, last)
        losses += legs[0].losses
        assert before is None or whole(legs, "loaded") == before
        before = whole(legs, "content")
    # The last mesh attends within documents, as the others do not.
    assert losses[:4] == pytest.approx(alone[:4], rel=1e-10)
    assert kind_of(ONE) == kind_of(FSDP_TP)


def test_a_checkpoint_holds_what_is_trained(
    gloo_pool: GlooPool, base: Path, tmp_path: Path
) -> None:
    on(gloo_pool, TENSOR, tmp_path, base, 1)
    manifest = read_manifest(tmp_path / "step-1")
    names = {name.split(".")[-1] for name in manifest.tensors if not name.startswith("optimizer.")}
    assert names == {"lora_a", "lora_b", "magnitude"}
    assert all("lora_" in name or "magnitude" in name for name in manifest.tensors)
    assert manifest.state[BASE_STATE]["path"] == str(base)


def test_the_first_loss_is_the_base_models(gloo_pool: GlooPool, base: Path, tmp_path: Path) -> None:
    """To the bit without DoRA, whose quotient of two lengths is rounded."""
    lora = {"model": {"handlers": ["lora"]}, "handlers": {"lora": {"dropout": 0.5}}}
    dora = {"model": {"handlers": ["lora"]}, "handlers": {"lora": {"dora": True}}}
    first = {}
    for name, settings in (("plain", {}), ("lora", lora), ("dora", dora)):
        [leg] = on(gloo_pool, Case(shard=1, settings=settings), tmp_path / name, base, 1)
        first[name] = leg.losses[0]
    assert first["lora"] == first["plain"]
    assert first["dora"] == pytest.approx(first["plain"], rel=1e-13)


def test_a_run_starts_from_the_adapters_of_another(
    gloo_pool: GlooPool, base: Path, tmp_path: Path
) -> None:
    """The base of the first is the base of the second."""
    legs = on(gloo_pool, TENSOR, tmp_path / "one", base, 1)
    again = on(gloo_pool, PIPELINE, tmp_path / "two", tmp_path / "one" / "step-1", 1)
    expected = {n: d for n, d in whole(legs, "content").items() if not n.startswith("optimizer.")}
    found = {n: d for n, d in whole(again, "loaded").items() if not n.startswith("optimizer.")}
    assert found == expected
    bases = [read_manifest(tmp_path / n / "step-1").state[BASE_STATE] for n in ("one", "two")]
    assert bases[0] == bases[1]


@pytest.fixture
def moved(gloo_pool: GlooPool, base: Path, tmp_path: Path) -> Any:
    """A run after a step, whose base is then moved away; the run's folder and the new place."""
    first, second = tmp_path / "hf", tmp_path / "elsewhere"
    shutil.copytree(base, first)
    on(gloo_pool, TENSOR, tmp_path / "run", first, 1)
    first.rename(second)
    return tmp_path / "run", second


def test_a_base_that_was_moved(gloo_pool: GlooPool, moved: Any, tmp_path: Path) -> None:
    run, place = moved
    legs = on(gloo_pool, TENSOR, run, tmp_path / "hf", 2)
    assert "does not exist. Fix: restore it" in legs[0].error
    legs = on(gloo_pool, TENSOR, run, place, 2)
    assert not legs[0].error and len(legs[0].losses) == 1


def test_a_base_that_was_changed(gloo_pool: GlooPool, moved: Any) -> None:
    run, place = moved
    file = place / "model.safetensors"
    content = bytearray(file.read_bytes())
    content[-1] ^= 1
    file.write_bytes(content)
    for leg in on(gloo_pool, TENSOR, run, place, 2):
        assert "is not the one that the checkpoint was trained on" in leg.error
        assert f"{place} (it was" in leg.error
