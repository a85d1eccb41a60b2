"""What context parallelism refuses, and what it does not."""

from typing import Any

import pytest

from torchtitan.config import JobConfig
from torchtitan.config.run_context import RunContext
from torchtitan.models.spec import ModelArgs
from torchtitan.preflight import context_parallel as context_checks

IN_ORDER = {"context_parallel_load_balancer": "none"}
ULYSSES = {"context_parallel_method": "ulysses"}


def problems(seq_len: int, degree: int, settings: dict[str, Any]) -> list[str]:
    """The debug model has 8 heads of queries and 4 of keys and values."""
    parallelism = {"context_parallel_degree": degree, **settings}
    sections = {"training": {"seq_len": seq_len}, "parallelism": parallelism}
    config = JobConfig.model_validate(sections)
    return [str(problem) for problem in context_checks.check_static(RunContext(config, 16, "cpu"))]


@pytest.mark.parametrize(
    ("seq_len", "degree", "settings"),
    [
        (10, 1, {}),
        (32, 4, {}),
        (12, 4, IN_ORDER),
        (12, 4, ULYSSES),
        (16, 8, ULYSSES),  # each two ranks share a head of keys
        (24, 4, {**ULYSSES, "tensor_parallel_degree": 2}),
        (8, 2, {"tensor_parallel_degree": 4}),
        (12, 2, {"tensor_parallel_degree": 3}),
    ],
)
def test_accepted(seq_len: int, degree: int, settings: dict[str, Any]) -> None:
    assert problems(seq_len, degree, settings) == []


@pytest.mark.parametrize(
    ("seq_len", "degree", "settings", "divisor", "above"),
    [
        (28, 4, {}, 8, 32),
        (5, 4, {}, 8, 8),
        (14, 4, IN_ORDER, 4, 16),
        (14, 4, ULYSSES, 4, 16),
        (28, 2, {"tensor_parallel_degree": 4}, 8, 32),
        (50, 1, {"tensor_parallel_degree": 4}, 4, 52),
        (3, 1, {"tensor_parallel_degree": 4}, 4, 4),
    ],
)
def test_lengths_that_cannot_be_cut(
    seq_len: int, degree: int, settings: dict[str, Any], divisor: int, above: int
) -> None:
    (problem,) = problems(seq_len, degree, settings)
    assert problem.startswith(f"training.seq_len = {seq_len}: is not a multiple of {divisor}, as")
    assert f"context_parallel_degree = {degree} and tensor_parallel_degree = " in problem
    assert problem.endswith(f"such as {above}.")


def test_nothing_follows_from_a_degree_that_is_refused() -> None:
    assert problems(18, 2, {"tensor_parallel_degree": 3}) == []
    (problem,) = problems(50, 3, ULYSSES)
    assert "ulysses cannot share out" in problem


@pytest.mark.parametrize(
    ("degree", "tensor_degree", "heads", "kv_heads"),
    [
        (3, 1, "8 heads of queries and 4", 4),
        (16, 1, "8 heads of queries and 4", 4),
        (8, 2, "4 heads of queries and 2", 2),
        (2, 8, "1 heads of queries and 1", 1),
    ],
)
def test_heads_that_cannot_be_shared_out(
    degree: int, tensor_degree: int, heads: str, kv_heads: int
) -> None:
    settings = {**ULYSSES, "tensor_parallel_degree": tensor_degree}
    (problem,) = problems(48, degree, settings)
    assert problem.startswith(f"parallelism.context_parallel_degree = {degree}: ")
    assert heads in problem
    assert f"set it to a divisor of {kv_heads}, or context_parallel_method to allgather" in problem


def test_packed_documents_without_a_kernel_are_worth_a_warning() -> None:
    found = {}
    for device in ("cuda", "cpu"):
        for method in ("allgather", "ring", "ulysses"):
            parallelism = {"context_parallel_degree": 2, "context_parallel_method": method}
            training = {"seq_len": 32, "document_mask": True}
            config = JobConfig.model_validate({"training": training, "parallelism": parallelism})
            found[device, method] = context_checks.check_static(RunContext(config, 2, device))
    slow = {case for case, problems in found.items() if problems}
    assert slow == {("cuda", "allgather"), ("cuda", "ring")}
    assert {problem.severity for case in slow for problem in found[case]} == {"warning"}


@pytest.mark.parametrize(("window", "expected"), [(8, 1), (32, 0), (33, 0)])
def test_windows_without_a_kernel_are_worth_a_warning(window: int, expected: int) -> None:
    for method, count in (("allgather", expected), ("ring", expected), ("ulysses", 0)):
        sections = {
            "model": {"args": {"sliding_window": window}},
            "training": {"seq_len": 32},
            "parallelism": {"context_parallel_degree": 2, "context_parallel_method": method},
        }
        context = RunContext(JobConfig.model_validate(sections), 2, "cuda")
        found = context_checks.check_static(context)
        assert [problem.severity for problem in found] == ["warning"] * count
        assert all("a window ends (8 tokens)" in str(problem) for problem in found)


def test_a_model_without_such_heads(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(context_checks, "model_args", lambda section: ModelArgs())
    (problem,) = problems(32, 2, {})
    assert "this model's attention cannot be spread over ranks. Fix: set it to 1." in problem
