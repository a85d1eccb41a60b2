"""Dropout is a function of seed, step, data and place: on every mesh, and after a resume."""

from pathlib import Path
from typing import Any

import pytest
import torch
from torch import Tensor, nn

from tests.distributed import random_model, runs
from tests.distributed.tiny import VOCAB_SIZE, Case, Result, compare, microbatches_of, train
from tests.forked import execute
from tests.parity.table import COMPILED, FULL, TOLERANCE
from tests.pool import GlooPool
from torchtitan.config.errors import ConfigError
from torchtitan.distributed.context import DistributedContext
from torchtitan.distributed.parallel_dims import ParallelDims
from torchtitan.parallel.random_streams import RandomStreams
from torchtitan.training import builder, model_builder

HANDLER = {"handlers": ["random_model"]}


def case_of(special: dict[str, Any], **mesh: Any) -> Case:
    model = {"handlers": [*HANDLER["handlers"], *special.get("model", {}).get("handlers", [])]}
    return Case(settings={**special, "model": model}, **mesh)


def train_randomly(world: DistributedContext, case: Case) -> Result:
    assert random_model.RandomModel  # registers the handler
    return train(world, case)


def test_compiled_masks_do_not_depend_on_the_mesh(gloo_pool: GlooPool) -> None:
    """Those that are not compiled are in the parity table. Microbatches hold the same sequences."""
    (expected,) = gloo_pool.run(1, train_randomly, case_of(COMPILED, microbatches=8))
    case = case_of(COMPILED | FULL, world_size=2, microbatches=4)
    assert compare(gloo_pool.run(2, train_randomly, case), expected).worst < TOLERANCE
    assert len({round(loss, 6) for loss in expected.losses}) == 3


def masks_of(world: DistributedContext, case: Case) -> dict[str, list[Tensor]]:
    """What each place drops in a step's forwards, and again where it is computed again."""
    assert random_model.RandomModel
    config = case.config()
    dims = ParallelDims(dp_shard=case.dp, cp=case.cp, tp=case.tp)
    mesh = dims.build_mesh("cpu")
    model = model_builder.build_model(config, VOCAB_SIZE, mesh, dims, world.device)
    masks: dict[str, list[Tensor]] = {}

    def note(name: str, module: nn.Module) -> None:
        masks[name] = []
        module.register_forward_hook(lambda *call: masks[name].append(call[2] == 0))

    block = model.parts[0].layers["0"]
    note("hidden", block.attention)  # [B, T/(tp cp), D], after the handler's hook
    note("channels", block.feed_forward.w1)  # [B, T/cp, F/tp]
    note("input", block.attention.wq.dropout)  # [B, T/cp, D]
    runner = builder.build_runner(config, model, mesh, dims, world.device)
    runner.forward_backward(microbatches_of(case, dims, world.rank), 100)
    return masks


@pytest.mark.parametrize(
    ("mesh", "alike"),
    [({"tp": 2}, {"input"}), ({"cp": 2}, set()), ({"shard": 2}, set())],
    ids=str,
)
def test_ranks_differ_but_for_what_they_have_alike(
    gloo_pool: GlooPool, mesh: dict[str, int], alike: set[str]
) -> None:
    case = case_of(FULL, world_size=2, microbatches=2, **mesh)
    ranks = gloo_pool.run(2, masks_of, case)
    for name, (first, recomputed, second, again) in ranks[0].items():
        assert 0.2 < first.double().mean() < 0.5
        assert first.equal(recomputed) and second.equal(again)
        assert not first.equal(second), "another microbatch"
        assert first.equal(ranks[1][name][0]) == (name in alike)


@pytest.mark.parametrize("mesh", [{"tp": 2}, {"cp": 2}], ids=str)
def test_recomputation_on_ranks_that_share_sequences(
    gloo_pool: GlooPool, mesh: dict[str, int]
) -> None:
    results = [
        result
        for special in ({}, FULL)
        for result in gloo_pool.run(2, train_randomly, case_of(special, world_size=2, **mesh))
    ]
    for result in results[1:]:
        assert result.losses == pytest.approx(results[0].losses, rel=TOLERANCE)
        assert result.norms == pytest.approx(results[0].norms, rel=TOLERANCE)


def test_data_ranks_of_tensor_ranks_differ(gloo_pool: GlooPool) -> None:
    """Two groups of two: within a group as above, between groups nothing is alike."""
    case = case_of({}, world_size=4, tp=2, shard=2, microbatches=2)
    for name in ("input", "channels"):
        first, second, third, fourth = (of[name][0] for of in gloo_pool.run(4, masks_of, case))
        assert first.equal(second) == third.equal(fourth) == (name == "input")
        assert not any(first.equal(other) or second.equal(other) for other in (third, fourth))


def test_layers_that_are_one_module_differ(gloo_pool: GlooPool) -> None:
    (masks,) = gloo_pool.run(1, masks_of, case_of({}, family="one block"))
    first, second = masks["hidden"]
    assert not first.equal(second)


def test_streams_differ_in_every_coordinate() -> None:
    def draw(seed: int = 0, step: int = 1, index: int = 0, **place: Any) -> int:
        streams = RandomStreams(seed, torch.device("cpu"), num_lanes=8, **place)
        streams.step = step
        streams.begin_microbatch(index)
        return int(torch.randint(2**62, ()))

    alone = draw()
    changes = ({"seed": 1}, {"step": 2}, {"index": 1}, {"part": (1, 0)}, {"part": (0, 1)})
    others = [draw(**change) for change in changes]  # type: ignore[arg-type]
    assert len({alone, *others}) == 6
    # Two data ranks of four lanes: rank 1's first lane is lane 4, and after a turn 12 is lane 4's.
    second = {"dp_degree": 2, "dp_rank": 1}
    assert draw(index=4) == draw(**second) and draw(index=12) == draw(index=4, **second)


def test_a_dropout_that_could_not_be_computed_again_is_refused(gloo_pool: GlooPool) -> None:
    careless = {"activation_checkpoint": {"mode": "full", "preserve_rng_state": False}}
    (error,) = gloo_pool.run(1, error_of, case_of(careless))
    assert "preserve_rng_state = false: layers.0.attention.wq.dropout is a dropout" in error


def error_of(world: DistributedContext, case: Case) -> str:
    with pytest.raises(ConfigError) as error:
        train_randomly(world, case)
    return str(error.value)


def run(folder: Path, *arguments: str, killed: bool = False) -> list[tuple[int, float, float]]:
    """The curve of a run, or of what a kill has left of it."""
    words = runs.command(
        folder,
        "--model.handlers=random_model",
        "--job.custom_import=tests.distributed.random_model",
        *arguments,
        processes=1 if killed else 2,
    )
    done = execute(runs.killed_after(6, words) if killed else words, env=runs.environment())
    assert done.returncode == (-9 if killed else 0), done.stderr
    rows = (row for row in runs.records(folder) if "loss" in row)
    return [(row["step"], row["loss"], row["grad_norm"]) for row in rows]


def test_a_resumed_run_draws_what_it_would_have_drawn(tmp_path: Path) -> None:
    """Killed in one process, it goes on in two; and validation changes nothing."""
    validation = ("--validation.enable", "--validation.dataset=stdlib", "--validation.freq=3")
    whole = run(tmp_path / "whole", *validation, "--validation.steps=1")
    run(tmp_path / "killed", killed=True)
    resumed = run(tmp_path / "killed")
    assert len(resumed) == 10
    for ours, theirs in zip(resumed, whole, strict=True):
        assert ours == pytest.approx(theirs, rel=1e-5)
