"""A checkpoint of any mesh goes on on any other: parameters and moments to the bit, the samples
that come next, and the losses of the steps that follow."""

import re
from collections.abc import Callable, Sequence
from dataclasses import dataclass, field
from typing import Any

import pytest

from tests.distributed import tiny
from tests.distributed.tiny import Case
from tests.faults.saving import digest, make_store
from tests.parity.table import PAIRS, TIED, dims_of, name_of, row
from tests.pool import GlooPool
from torchtitan.checkpoint.manager import CheckpointManager
from torchtitan.checkpoint.manifest import RunState
from torchtitan.checkpoint.state import model_tensors, optimizer_tensors
from torchtitan.config.run_context import RunContext
from torchtitan.config.schema import Checkpoint
from torchtitan.data.tokenizers import build_tokenizer
from torchtitan.distributed.context import DistributedContext
from torchtitan.distributed.parallel_dims import AXES, ParallelDims
from torchtitan.loss.cross_entropy import CrossEntropyLoss
from torchtitan.optim.optimizer import build_optimizers
from torchtitan.parallel.grad_clip import clip_gradients, gradient_norm
from torchtitan.training import builder, model_builder

SAVED_STEP = 2
LAST_STEP = 4
V, LOOP, ONE_EACH = ({"schedule": name} for name in ("ZBVZeroBubble", "Interleaved1F1B", "1F1B"))

SHARED, ADAPTED = {"family": "shared by blocks"}, {"family": "low rank"}


def mesh(**degrees: object) -> Case:
    """Of a model with layers enough for two stages on each of two ranks."""
    halved = [PAIRS] if "pp" in degrees else []
    return row(*halved, **{"layers": 4, **degrees})  # type: ignore[arg-type]


MOVES = [
    (mesh(), mesh(shard=2, tp=2)),
    (mesh(shard=2, tp=2), mesh(pp=2, **V)),
    (mesh(pp=2, **V), mesh(pp=2, **LOOP)),
    (mesh(pp=2, **LOOP), mesh(pp=2, **V)),
    (mesh(pp=2, **LOOP), mesh(pp=4, **ONE_EACH)),
    (mesh(pp=4, **ONE_EACH), mesh(shard=2, pp=2, **V)),
    (mesh(pp=2, **V), mesh()),
    (mesh(tp=2), mesh(tp=4)),
    (mesh(tp=4), mesh(shard=2, tp=2)),
    (mesh(cp=2), mesh(cp=4)),
    (mesh(cp=4), mesh(cp=2, tp=2)),
    (mesh(cp=2, tp=2), mesh(replicate=2, tp=2)),
    (mesh(replicate=2, tp=2), mesh(replicate=4)),
    (mesh(replicate=4), mesh(replicate=2, shard=2)),
    (mesh(replicate=2, shard=2), mesh(shard=4)),
    (mesh(shard=4), mesh(shard=2)),
    (mesh(shard=2), mesh(replicate=2, cp=2)),
    (mesh(shard=4), mesh(cp=2, tp=2, pp=2, **V)),
    (row(shard=2, tp=2, **TIED), row(replicate=2, cp=2, **TIED)),
    (row(replicate=2, cp=2, **TIED), row(tp=4, **TIED)),
    (mesh(**TIED), mesh(pp=2, **V, **TIED)),
    (mesh(pp=2, **V, **TIED), mesh(shard=2, tp=2, pp=2, **LOOP, **TIED)),
    (mesh(shard=2, tp=2, pp=2, **LOOP, **TIED), mesh(**TIED)),
    (mesh(shard=2, **SHARED), mesh(tp=2, pp=2, **ONE_EACH, **SHARED)),
    (mesh(tp=2, **ADAPTED), mesh(shard=2, **ADAPTED)),
]
NIGHTLY_MOVES = [
    (mesh(shard=2, tp=4), mesh(shard=4, tp=2)),
    (mesh(shard=4, tp=2), mesh(tp=8)),
    (mesh(cp=2, tp=2, pp=2, **V), mesh(replicate=2, shard=2, tp=2)),
    (mesh(shard=2, tp=2, pp=2, **LOOP), mesh(shard=2, cp=2, pp=2, **ONE_EACH)),
    (mesh(shard=2, cp=2, tp=2, pp=2, **LOOP), mesh()),
]
"""Moves between many ranks. By day every axis changes in every way, three of them at once."""


@dataclass
class Leg:
    """What one rank knows of a part of a run."""

    loaded: dict[str, str] = field(default_factory=dict)
    """Digests of the whole tensors that this rank has, or has a part of, at the start of it."""
    content: dict[str, str] = field(default_factory=dict)
    """The same at the end."""
    dp_rank: int = 0
    samples: dict[int, list[str]] = field(default_factory=dict)
    """By step: digests of the sequences that this data rank read."""
    losses: dict[int, float] = field(default_factory=dict)
    norms: dict[int, float] = field(default_factory=dict)
    state: RunState = field(default_factory=RunState)


def go_on(world: DistributedContext, case: Case, folder: str, last: int, save: bool) -> Leg:
    """From what the folder holds, or the start, to step `last`."""
    config = case.config()
    context = RunContext(config, world.world_size, "cpu")
    dims = ParallelDims.from_section(context.config.parallelism, context.world_size)
    device_mesh = tiny.mesh_of(world, dims)
    manager = CheckpointManager(Checkpoint(enable=True), make_store(world, folder), world)
    loader = builder.build_loader(context, dims, world, build_tokenizer("bytes"), manager)
    # Other weights than those of the checkpoint, should it load less than all.
    model = model_builder.build_model(config, tiny.VOCAB_SIZE, device_mesh, dims, world.device)
    optimizers = build_optimizers(
        config.optimizer, model.parts, world.device, model.parameter_names
    )
    manager.load(model.parts, optimizers)
    runner = builder.build_runner(config, model, device_mesh, dims, world.device)

    def digests() -> dict[str, str]:
        tensors = model_tensors(model.parts) | optimizer_tensors(model.parts, optimizers)
        return {name: digest(tensor) for name, tensor in tensors.items()}

    leg = Leg(dp_rank=dims.dp_rank(world.rank), state=manager.state)
    leg.loaded = digests()
    batches = tiny.microbatches_of(case, dims, world.rank)
    num_targets = int(CrossEntropyLoss().count(tiny.sequences()))
    for step in range(manager.state.step + 1, last + 1):
        data = loader.next_step()
        read = (batch["tokens"] for batch in data.microbatches)
        leg.samples[step] = [digest(sequence) for tokens in read for sequence in tokens]
        leg.losses[step] = runner.forward_backward(batches, num_targets).item()
        norm = gradient_norm(model.parameters, dims.ranks_per_stage, model.uncounted)
        clip_gradients(model.parameters, norm, tiny.MAX_NORM)
        leg.norms[step] = norm.item()
        for optimizer in optimizers:
            optimizer.step()
            optimizer.zero_grad()
    if save:
        state = RunState(last, last * 1000, data_fingerprint=loader.fingerprint)
        manager.save(state, data.lane_states, model.parts, optimizers, finished=False, last=True)
    loader.close()
    leg.content = digests()
    return leg


def on_its_mesh(pool: GlooPool, case: Case, *args: Any) -> list[Leg]:
    """Run `go_on` on all ranks; the mesh stays for the next move, which often starts from it."""
    return pool.run(case.world_size, go_on, case, *args, keep=dims_of(case))


def together(contents: Sequence[dict[str, str]]) -> dict[str, str]:
    """What all ranks have; those that have the same must agree."""
    whole: dict[str, str] = {}
    for content in contents:
        assert all(whole.get(name, value) == value for name, value in content.items())
        whole |= content
    return whole


def samples_of(legs: Sequence[Leg], step: int) -> list[str]:
    """Of a whole step; ranks of the same part of the data must have read the same."""
    by_rank = together([{str(leg.dp_rank): " ".join(leg.samples[step])} for leg in legs])
    return " ".join(by_rank[str(rank)] for rank in range(len(by_rank))).split()


@pytest.fixture(scope="module")
def uninterrupted(
    gloo_pool: GlooPool, tmp_path_factory: pytest.TempPathFactory
) -> Callable[[Case], Leg]:
    """One process that trains the same model to the last step."""
    legs: dict[tuple[int, bool, str], Leg] = {}

    def train(case: Case) -> Leg:
        model = case.layers, case.tied, case.family
        if model not in legs:
            alone = Case(layers=case.layers, tied=case.tied, family=case.family)
            folder = str(tmp_path_factory.mktemp("alone"))
            [legs[model]] = gloo_pool.run(1, go_on, alone, folder, LAST_STEP, False)
        return legs[model]

    return train


@pytest.fixture(scope="module")
def saved(
    gloo_pool: GlooPool, tmp_path_factory: pytest.TempPathFactory
) -> Callable[[Case], tuple[str, dict[str, str]]]:
    """The folder of a checkpoint that was written on a mesh, and its content."""
    done: dict[str, tuple[str, dict[str, str]]] = {}

    def save(case: Case) -> tuple[str, dict[str, str]]:
        name = name_of(case)
        if name not in done:
            folder = str(tmp_path_factory.mktemp("saved"))
            legs = on_its_mesh(gloo_pool, case, folder, SAVED_STEP, True)
            done[name] = folder, together([leg.content for leg in legs])
        return done[name]

    return save


@pytest.mark.fault("F30")
@pytest.mark.parametrize(
    ("before", "after"),
    [*MOVES, *(pytest.param(*move, marks=pytest.mark.nightly) for move in NIGHTLY_MOVES)],
    ids=lambda case: re.sub(", (allgather headtail|microbatch size 2)", "", name_of(case)),
)
def test_a_run_moves(before: Case, after: Case, gloo_pool: GlooPool, saved, uninterrupted) -> None:
    folder, content = saved(before)
    legs = on_its_mesh(gloo_pool, after, folder, LAST_STEP, False)
    assert together([leg.loaded for leg in legs]) == content
    expected = uninterrupted(before)
    for leg in legs:
        assert (leg.state.step, leg.state.num_tokens_seen) == (SAVED_STEP, 1000 * SAVED_STEP)
        assert list(leg.losses) == list(range(SAVED_STEP + 1, LAST_STEP + 1))
        for step in leg.losses:
            assert leg.losses[step] == pytest.approx(expected.losses[step], rel=1e-9)
            assert leg.norms[step] == pytest.approx(expected.norms[step], rel=1e-9)
            assert samples_of(legs, step) == expected.samples[step]


def test_what_is_compared_is_not_always_the_same(saved, uninterrupted) -> None:
    expected = uninterrupted(mesh())
    assert len(set(expected.losses.values())) == LAST_STEP
    assert len(set().union(*map(set, expected.samples.values()))) == LAST_STEP * 8
    _, content = saved(mesh())
    assert content.keys() == expected.loaded.keys()
    of_model = [name for name in content if not name.startswith("optimizer.")]
    assert len(of_model) * 4 == len(content), "a step count and two moments for each parameter"
    assert all(content[name] != expected.loaded[name] for name in content)


def test_every_axis_appears_grows_shrinks_and_disappears() -> None:
    seen = set()
    for before, after in MOVES:
        for axis in AXES:
            old, new = (getattr(dims_of(case), axis) for case in (before, after))
            if old != new:
                kind = "appears" if old == 1 else "disappears" if new == 1 else "changes"
                seen.add((axis, kind if kind != "changes" else "grows" if new > old else "shrinks"))
    kinds = ("appears", "grows", "shrinks", "disappears")
    assert seen == {(axis, kind) for axis in AXES for kind in kinds}
