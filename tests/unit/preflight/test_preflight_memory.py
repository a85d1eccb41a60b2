"""Memory options that cannot work together, or save nothing."""

from typing import Any

import pytest

from torchtitan.config import ConfigIssue, JobConfig
from torchtitan.config.run_context import RunContext
from torchtitan.preflight.memory import check_static

EARLY = {"early_step_in_backward": True}
UNCLIPPED = {"local_batch_size": 2, "max_norm": float("inf")}
BUDGET = {"mode": "memory_budget"}


def found(
    world_size: int = 1, device_type: str = "cuda", **sections: dict[str, Any]
) -> list[ConfigIssue]:
    return check_static(RunContext(JobConfig.model_validate(sections), world_size, device_type))


def only(problems: list[ConfigIssue], key: str, *parts: str) -> ConfigIssue:
    [problem] = problems
    assert problem.key == key
    for part in parts:
        assert part in str(problem)
    return problem


def test_defaults_are_fine() -> None:
    assert found() == []


def test_cpu_offload_needs_shards() -> None:
    training = {"enable_cpu_offload": True}
    mesh = {"data_parallel_replicate_degree": 2, "data_parallel_shard_degree": 1}
    problems = found(2, training=training, parallelism=mesh)
    problem = only(problems, "training.enable_cpu_offload", "DDP", "data_parallel_shard_degree")
    assert problem.severity == "error"
    for fine in (
        {"data_parallel_shard_degree": 2},
        {"data_parallel_replicate_degree": 2, "data_parallel_shard_degree": 2},
        {"data_parallel_replicate_degree": 2, "context_parallel_degree": 2},
    ):
        assert found(4, training=training, parallelism=fine) == []


def test_a_cpu_has_nothing_to_offload_to() -> None:
    for key, sections in {
        "training.enable_cpu_offload": {"training": {"enable_cpu_offload": True}},
        "activation_checkpoint.offload": {"activation_checkpoint": {"offload": True}},
    }.items():
        assert only(found(1, "cpu", **sections), key, "already").severity == "warning"
        assert found(1, "cuda", **sections) == []


def test_early_steps_need_unclipped_gradients() -> None:
    problems = found(optimizer=EARLY, training={**UNCLIPPED, "max_norm": 1.0})
    only(problems, "training.max_norm", "1.0", "set it to inf", "early_step_in_backward to false")
    assert found(optimizer=EARLY, training=UNCLIPPED) == []


@pytest.mark.parametrize("key", ["on_non_finite", "on_loss_spike"])
def test_early_steps_cannot_be_skipped(key: str) -> None:
    problems = found(optimizer=EARLY, training={**UNCLIPPED, key: "skip"})
    only(problems, f"training.{key}", "skip", "early_step_in_backward to false")


def test_early_steps_need_one_microbatch() -> None:
    training = {**UNCLIPPED, "global_batch_size": 8}
    problems = found(2, optimizer=EARLY, training=training)
    fix = "training.global_batch_size"
    only(problems, "optimizer.early_step_in_backward", "2 microbatches", fix)
    assert found(4, optimizer=EARLY, training=training) == []


def test_early_steps_need_one_microbatch_in_a_pipeline() -> None:
    mesh: dict[str, Any] = {"pipeline_parallel_degree": 2}
    problems = found(2, optimizer=EARLY, training=UNCLIPPED, parallelism=mesh)
    fix = "parallelism.pipeline_parallel_microbatch_size, pipeline"
    only(problems, "optimizer.early_step_in_backward", "2 microbatches", fix, "GPipe")
    mesh["pipeline_parallel_microbatch_size"] = 2
    assert found(2, optimizer=EARLY, training=UNCLIPPED, parallelism=mesh) == []


@pytest.mark.parametrize("backend", ["inductor", "aot_eager"])
def test_a_memory_budget_is_the_compiler_s(backend: str) -> None:
    key = "activation_checkpoint.mode"
    only(found(activation_checkpoint=BUDGET), key, 'model.handlers = ["compile"]')
    compiled: dict[str, dict[str, Any]] = {
        "model": {"handlers": ["compile"]},
        "handlers": {"compile": {"backend": backend}},
        "activation_checkpoint": BUDGET,
    }
    assert found(**compiled) == []
    compiled["handlers"] = {}
    assert found(**compiled) == []
    for other in ("eager", "cudagraphs"):
        compiled["handlers"] = {"compile": {"backend": other}}
        only(found(**compiled), key, f"the backend {other}", "inductor")


@pytest.mark.parametrize("budget", [-0.1, 1.1])
def test_a_memory_budget_is_a_fraction(budget: float) -> None:
    with pytest.raises(ValueError, match="memory_budget"):
        JobConfig.model_validate({"activation_checkpoint": {"memory_budget": budget}})
