"""A default that nobody wrote stops no run: it is adjusted to the rest, with a notice."""

from dataclasses import replace

import pytest

from torchtitan.config.load import load_config
from torchtitan.config.run_context import RunContext
from torchtitan.config.schema import LRScheduler
from torchtitan.preflight import ARITHMETIC, preflight

PROFILED = ("--profiling.enable_profiling", "--profiling.profiler_active=20")


def facts_of(world_size: int, *flags: str) -> RunContext:
    return RunContext(
        load_config(["--training.dataset=stdlib", "--checkpoint.enable", *flags]).config,
        world_size,
        "cpu",
    )


@pytest.mark.parametrize(
    ("world_size", "flags", "expected"),
    [
        (1, ["--training.steps=60"], "lr_scheduler.warmup_steps: is unset, and 12 in this run"),
        (1, ["--training.global_batch_size=4"], "local_batch_size: is unset, and 4 in this run"),
        (3, ["--training.global_batch_size=30"], "local_batch_size: is unset, and 5 in this run"),
        (1, PROFILED, "profiling.profile_freq: is unset, and 23 in this run"),
    ],
)
def test_an_untouched_default_is_adjusted_with_one_notice(
    world_size: int, flags: list[str], expected: str
):
    (problem,) = preflight(facts_of(world_size, *flags), [ARITHMETIC])
    assert expected in str(problem) and problem.severity == "warning"


@pytest.mark.parametrize(
    "flags", [[], ["--training.steps=200"], ["--training.global_batch_size=24"]]
)
def test_a_default_that_fits_is_left_alone(flags: list[str]):
    context = facts_of(1, *flags)
    assert preflight(context, [ARITHMETIC]) == []
    assert context.config.training.local_batch_size == 8 and context.warmup_steps == 200


@pytest.mark.parametrize(("steps", "warmup"), [(200, 20), (10, 1), (2, 0)])
def test_a_warmup_that_is_all_the_decay_leaves_needs_no_notice(steps: int, warmup: int):
    context = facts_of(1, "--lr_scheduler.decay_ratio=0.9", f"--training.steps={steps}")
    assert preflight(context, [ARITHMETIC]) == [] and context.warmup_steps == warmup


@pytest.mark.parametrize(
    ("key", "value", "other"),
    [
        ("lr_scheduler.warmup_steps", 200, ["--training.steps=60"]),
        ("training.local_batch_size", 8, ["--training.global_batch_size=4"]),
        ("profiling.profile_freq", 10, PROFILED),
    ],
)
def test_the_same_value_written_down_is_judged(key: str, value: int, other: list[str]):
    (problem,) = preflight(facts_of(1, f"--{key}={value}", *other), [ARITHMETIC])
    assert problem.severity == "error"


@pytest.mark.parametrize(
    ("steps", "decay_ratio", "warmup"),
    [
        (10_000, None, 200),
        (199, None, 39),
        (1, None, 0),
        (220, 0.1, 44),
        (100, 0.9, 10),
        (100, 1.0, 0),
    ],
)
def test_an_unset_warmup_fits_beside_the_decay(steps: int, decay_ratio: float, warmup: int):
    assert LRScheduler(decay_ratio=decay_ratio).warmup(steps) == warmup


def test_a_batch_that_was_stored_with_the_run_is_fitted_too():
    """The same command on more ranks: 8 sequences a rank are more than the run's batch of 16."""
    context = facts_of(4)
    training = context.config.training.model_copy(update={"global_batch_size": 16})
    stored = replace(context, config=context.config.model_copy(update={"training": training}))
    assert stored.config.training.local_batch_size == 4


def test_microbatches_of_a_pipeline_divide_the_fitted_batch():
    size = "--parallelism.pipeline_parallel_microbatch_size=2"
    context = facts_of(
        2, "--parallelism.pipeline_parallel_degree=2", size, "--training.global_batch_size=12"
    )
    assert context.config.training.local_batch_size == 6
