"""The handler `freeze`: what it freezes, what it refuses, and that nothing of it is trained."""

from typing import Any

import pytest
import torch

from tests.distributed import tiny
from tests.distributed.tiny import Case
from tests.parity.table import FROZEN_START, row
from tests.pool import GlooPool
from torchtitan.checkpoint.state import model_tensors, optimizer_tensors
from torchtitan.config import ConfigError, JobConfig
from torchtitan.config.run_context import RunContext
from torchtitan.distributed.context import DistributedContext
from torchtitan.distributed.parallel_dims import ParallelDims
from torchtitan.handlers.freeze import FreezeHandler
from torchtitan.models.registry import get_family
from torchtitan.optim.optimizer import build_optimizers, step_optimizers
from torchtitan.preflight import MODEL, preflight
from torchtitan.preflight.handlers import check_static
from torchtitan.training import builder, model_builder

HEAD_ONLY = {
    "model": {"handlers": ["freeze"]},
    "handlers": {"freeze": {"only": ["output.*"]}},
}


def config_of(tied: bool = False, **settings: list[str]) -> JobConfig:
    args = {"n_layers": 2, "vocab_size": 64, "tied_embeddings": tied}
    return JobConfig.model_validate(
        {"model": {"handlers": ["freeze"], "args": args}, "handlers": {"freeze": settings}}
    )


def frozen(config: JobConfig) -> set[str]:
    family = get_family("llama3")
    with torch.device("meta"):
        model = family.build(family.resolve(config.model))
    dims = ParallelDims.from_section(config.parallelism, 1)
    FreezeHandler(config, dims).convert(model)
    return {name for name, tensor in model.named_parameters() if not tensor.requires_grad}


def test_patterns() -> None:
    found = frozen(config_of(patterns=["tok_embeddings.*", "layers.1.attention.w?.weight"]))
    matrices = {f"layers.1.attention.{name}.weight" for name in ("wq", "wk", "wv", "wo")}
    assert found == {"tok_embeddings.weight", *matrices}


def test_only() -> None:
    found = frozen(config_of(only=["*norm.weight", "output.*"]))
    assert "layers.0.attention_norm.weight" not in found
    assert {"tok_embeddings.weight", "layers.0.feed_forward.w1.weight"} <= found
    assert not {"norm.weight", "output.weight"} & found


def test_a_tied_matrix_goes_by_both_of_its_names() -> None:
    assert frozen(config_of(tied=True, patterns=["output.*"])) == {"tok_embeddings.weight"}
    assert "tok_embeddings.weight" not in frozen(config_of(tied=True, only=["output.*"]))


@pytest.mark.parametrize(
    ("settings", "key", "expected"),
    [
        ({"patterns": ["layer.1.*"]}, "patterns[0]", 'did you mean "layers.1.*"?'),
        ({"only": ["norm.*", "*.wx.weight"]}, "only[1]", "it matches no parameter"),
        ({"patterns": ["*"]}, "patterns", "freezes every parameter"),
    ],
)
def test_what_the_model_does_not_have_is_found_before_the_run(
    settings: dict[str, list[str]], key: str, expected: str
) -> None:
    [problem] = preflight(RunContext(config_of(**settings), 1, "cpu"), [MODEL])
    assert problem.key == f"handlers.freeze.{key}"
    assert expected in str(problem)
    with pytest.raises(ConfigError):
        frozen(config_of(**settings))


@pytest.mark.parametrize(
    ("settings", "expected"),
    [
        ({}, "is empty, and patterns too"),
        ({"patterns": ["a"], "only": ["b"]}, "does not go with patterns"),
        ({"patterns": ["a"], "pattern": ["b"]}, 'did you mean "patterns"?'),
    ],
)
def test_settings(settings: dict[str, Any], expected: str) -> None:
    [problem] = check_static(RunContext(config_of(**settings), 1, "cpu"))
    assert expected in str(problem)


def test_patterns_of_groups_may_name_what_is_frozen() -> None:
    """They are of the model; that a part of it is not trained makes none of them wrong."""
    config = config_of(patterns=["*norm.weight"])
    assert preflight(RunContext(config, 1, "cpu"), [MODEL]) == []
    model = torch.nn.ModuleDict({"norm": torch.nn.RMSNorm(2), "wq": torch.nn.Linear(2, 2)})
    model["norm"].requires_grad_(False)
    names = [name for name, _ in model.named_parameters()]
    [optimizer] = build_optimizers(config.optimizer, [model], torch.device("cpu"), names)
    assert [group["names"] for group in optimizer.param_groups] == [["wq.weight", "wq.bias"]]


def step_once(world: DistributedContext, case: Case) -> dict[str, tuple[bool, bool, bool]]:
    """Of each parameter of this rank: has it a gradient, state, and another value afterwards?"""
    config = case.config()
    dims = ParallelDims.from_section(config.parallelism, world.world_size)
    mesh = dims.build_mesh("cpu")
    model = model_builder.build_model(config, tiny.VOCAB_SIZE, mesh, dims, world.device)
    runner = builder.build_runner(config, model, mesh, dims, world.device)
    optimizers = build_optimizers(
        config.optimizer, model.parts, world.device, model.parameter_names
    )
    update = builder.build_update(config, model, optimizers, dims)
    weights = {name: tensor for part in model.parts for name, tensor in part.named_parameters()}
    before = {name: tensor.detach().clone() for name, tensor in weights.items()}
    runner.forward_backward(tiny.microbatches_of(case, dims, world.rank), 100)
    has_gradient = {name: tensor.grad is not None for name, tensor in weights.items()}
    assert update.gradient_norm() > 0  # collective, also where nothing is trained
    step_optimizers(optimizers, torch.tensor(True))
    state = optimizer_tensors(model.parts, optimizers)
    assert model_tensors(model.parts).keys() == weights.keys()
    return {
        name: (
            has_gradient[name],
            f"optimizer.{name}.exp_avg" in state,
            not torch.equal(before[name].to_local(), tensor.to_local()),  # type: ignore[attr-defined]
        )
        for name, tensor in weights.items()
    }


@pytest.mark.parametrize(
    "case",
    [row(FROZEN_START, shard=2), row(FROZEN_START, tp=2), row(FROZEN_START, pp=2, schedule="1F1B")],
    ids=["fsdp", "tp", "pp"],
)
def test_no_gradient_no_state_no_change(case: Case, gloo_pool: GlooPool) -> None:
    found = gloo_pool.run(2, step_once, case)
    for parameters in found:
        for name, seen in parameters.items():
            is_frozen = name.startswith(("tok_embeddings.", "layers.0."))
            assert seen == ((not is_frozen,) * 3), name
    assert {"tok_embeddings.weight", "output.weight"} <= found[0].keys() | found[1].keys()


@pytest.mark.parametrize(
    ("size", "case"),
    [
        (1, row(HEAD_ONLY)),
        (1, row(HEAD_ONLY, microbatches=2)),
        (2, row(HEAD_ONLY, tp=2)),
        (2, row(HEAD_ONLY, shard=2)),
        (2, row(HEAD_ONLY, replicate=2)),
        (2, row(HEAD_ONLY, pp=2, schedule="1F1B")),
    ],
    ids=["one", "accumulated", "tp", "fsdp", "ddp", "pp"],
)
def test_the_head_alone(size: int, case: Case, gloo_pool: GlooPool) -> None:
    """Hidden states need no gradient then, which FSDP takes the end of the backward from."""
    for parameters in gloo_pool.run(size, step_once, case):
        for name, seen in parameters.items():
            assert seen == ((name == "output.weight",) * 3), name
