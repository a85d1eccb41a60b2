"""What tensor parallelism refuses, and what it proposes instead."""

from typing import Any

import pytest

from torchtitan.config import JobConfig
from torchtitan.config.run_context import RunContext
from torchtitan.preflight import data as data_checks
from torchtitan.preflight import tensor_parallel as tensor_checks

ASYNC = {"enable_async_tensor_parallel": True}
COMPILED = {"handlers": ["compile"]}


def context(
    degree: int,
    seq_len: int = 48,
    device: str = "cpu",
    args: dict[str, Any] | None = None,
    model: dict[str, Any] | None = None,
    world_size: int = 16,
    **parallelism: Any,
) -> RunContext:
    """The debug model has 8 heads of queries, 4 of keys and values, and 768 hidden channels."""
    sections = {
        "model": {"args": args or {}, **(model or {})},
        "training": {"seq_len": seq_len},
        "parallelism": {"tensor_parallel_degree": degree, **parallelism},
    }
    return RunContext(JobConfig.model_validate(sections), world_size, device)


def problems(*arguments: Any, **settings: Any) -> list[str]:
    return [str(problem) for problem in tensor_checks.check_static(context(*arguments, **settings))]


@pytest.mark.parametrize("degree", [1, 2, 4, 8])
def test_accepted(degree: int) -> None:
    """Also more ranks than heads of keys: ranks share one."""
    assert problems(degree) == []
    assert problems(degree, 96, context_parallel_degree=2) == []


@pytest.mark.parametrize(
    ("degree", "args", "expected"),
    [
        (3, {}, ["does not divide model.args.n_heads = 8", "set it to a divisor"]),
        (16, {}, ["does not divide model.args.n_heads = 8"]),
        (
            6,
            {"dim": 384, "n_heads": 12, "n_kv_heads": 4, "ffn_dim": 960},
            ["neither divides model.args.n_kv_heads = 4 nor is a multiple"],
        ),
        (8, {"ffn_dim": 100}, ["does not divide the feed-forward's width, 100"]),
        (
            4,
            {"vocab_size": 5},
            ["leaves a rank without any of the vocabulary's 5 tokens"],
        ),
    ],
)
def test_what_cannot_be_shared_out(degree: int, args: dict[str, Any], expected: list[str]) -> None:
    [problem] = problems(degree, args=args)
    assert f"parallelism.tensor_parallel_degree = {degree}: " in problem
    for text in expected:
        assert text in problem


@pytest.mark.parametrize(("vocab_size", "fits"), [(5, False), (6, False), (7, True), (131, True)])
def test_every_rank_has_tokens(vocab_size: int, fits: bool) -> None:
    """6 tokens over 4 ranks are 2, 2, 2 and none."""
    assert (problems(4, args={"vocab_size": vocab_size}) == []) == fits


def test_rows_cut_unevenly_need_columns_that_can_be_sharded() -> None:
    """The debug model is 256 wide, and 48 processes are 24 shards of 2 ranks."""
    [problem] = problems(2, args={"vocab_size": 131}, world_size=48)
    assert "131 tokens unevenly" in problem and "256, has to be sharded" in problem
    assert "model.args.vocab_size to a multiple of 2" in problem
    assert problems(2, args={"vocab_size": 132}, world_size=48) == []
    assert problems(2, args={"vocab_size": 131}, world_size=32) == []
    assert problems(2, world_size=48) == []
    [problem] = map(str, data_checks._vocabulary_problems(context(2, world_size=48), 131))
    assert "131 tokens unevenly" in problem


def test_every_problem_is_told() -> None:
    assert len(problems(7, 10, args={"vocab_size": 8})) == 3  # and none of the sequence, beside


def test_a_model_that_says_nothing_cannot_be_cut() -> None:
    from torchtitan.models.spec import ModelArgs

    [problem] = ModelArgs().tensor_parallel_problems(2)
    assert "has no tensor-parallel plan" in str(problem)


def test_the_vocabulary_of_the_tokenizer_is_judged() -> None:
    [problem] = data_checks._vocabulary_problems(context(4), 5)
    assert "leaves a rank without any of the vocabulary's 5 tokens" in str(problem)
    assert data_checks._vocabulary_problems(context(4), 131) == []
    assert data_checks._vocabulary_problems(context(1), 1) == []


@pytest.mark.parametrize(("local", "straddles"), [(2, True), (6, True), (4, False), (8, False)])
def test_ranks_on_several_machines(
    local: int, straddles: bool, monkeypatch: pytest.MonkeyPatch
) -> None:
    place = {"WORLD_SIZE": 24, "RANK": 0, "LOCAL_RANK": 0, "LOCAL_WORLD_SIZE": local}
    for name, value in {**place, "MASTER_ADDR": "localhost", "MASTER_PORT": 29500}.items():
        monkeypatch.setenv(name, str(value))
    found = tensor_checks.check_static(context(4, world_size=24))
    assert [problem.severity for problem in found] == ["warning"] * straddles
    assert tensor_checks.check_static(context(4, world_size=16)) == [], (
        "another run than the launched one"
    )


@pytest.mark.parametrize(
    ("degree", "device", "model", "handlers", "expected"),
    [
        (1, "cuda", COMPILED, {}, "nothing is exchanged"),
        (2, "cpu", COMPILED, {}, "needs CUDA devices, and this run is on cpu"),
        (2, "cuda", {}, {}, "it is the compiler"),
        (2, "cuda", COMPILED, {"compile": {"backend": "eager"}}, "it is the compiler"),
        (2, "cuda", COMPILED, {}, None),
    ],
)
def test_overlap(
    degree: int,
    device: str,
    model: dict[str, Any],
    handlers: dict[str, Any],
    expected: str | None,
) -> None:
    given = context(degree, device=device, model=model, **ASYNC)
    given = RunContext(given.config.model_copy(update={"handlers": handlers}), 16, device)
    found = [str(problem) for problem in tensor_checks.check_static(given)]
    assert len(found) == (expected is not None)
    assert all(expected in problem for problem in found)
