"""A tiny run with adapters on a base in a Hugging Face folder, on any mesh."""

from dataclasses import dataclass, field
from functools import partial
from pathlib import Path

from tests.distributed import tiny
from tests.distributed.tiny import VOCAB_SIZE, Case
from tests.faults.saving import digest, make_store
from tests.foreign import random_weights, write_hf
from tests.pool import GlooPool
from torchtitan.checkpoint.manager import CheckpointManager
from torchtitan.checkpoint.manifest import RunState
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


def write_base(folder: Path, case: Case) -> Path:
    """Write a Hugging Face folder of the case's model."""
    args = get_family("llama3").resolve(case.config().model, VOCAB_SIZE)
    assert isinstance(args, DecoderArgs)
    weights = random_weights(args)
    write_hf(folder, {name: w * (0.1 if w.dim() == 2 else 1) for name, w in weights.items()}, args)
    return folder


@dataclass
class Leg:
    """One rank's record of a part of a run."""

    losses: list[float] = field(default_factory=list)
    loaded: dict[str, str] = field(default_factory=dict)
    """Digests of whole tensors at the start."""
    content: dict[str, str] = field(default_factory=dict)
    """The same at the end."""
    error: str = ""


def train(world: DistributedContext, case: Case, folder: str, base: str | None, last: int) -> Leg:
    """Go on from what `folder` holds, or from `base`, if any, to step `last`, and save it."""
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


def on(pool: GlooPool, case: Case, folder: Path, base: Path | None, last: int) -> list[Leg]:
    """Run `train` on all ranks of the case's mesh."""
    path = None if base is None else str(base)
    return pool.run(case.world_size, train, case, str(folder), path, last)
