"""What a mesh would get wrong of a model is said before a run starts, with the names it has."""

from collections.abc import Callable, Iterator, Sequence
from dataclasses import replace
from typing import Any

import pytest
import torch
from torch import nn

from tests.distributed import own_models
from tests.distributed.tiny import Case
from torchtitan.config import ConfigError, ConfigIssue, JobConfig
from torchtitan.config.run_context import RunContext
from torchtitan.config.schema import Section
from torchtitan.distributed.context import fake_world
from torchtitan.distributed.parallel_dims import ParallelDims
from torchtitan.handlers.base import ModelHandler
from torchtitan.handlers.registry import HANDLERS, HandlerEntry, register_handler
from torchtitan.models.registry import MODELS
from torchtitan.models.spec import InitRule
from torchtitan.parallel.tensor_parallel import TensorStyles
from torchtitan.preflight import MODEL, errors_of, preflight
from torchtitan.training import model_builder

CHANGE: list[Callable[[nn.Module], object]] = []
"""What the handler `change` does to the model, and to the plan."""
EXTEND: list[Callable[[dict[str, Any]], object]] = []


class Change(ModelHandler):
    def convert(self, model: nn.Module) -> None:
        for change in CHANGE:
            change(model)

    def init_rule(self, name: str) -> InitRule | None:
        return InitRule("normal") if name.endswith(("gain", ".up", ".bias")) else None

    def extend_tp_plan(self, plan: dict[str, Any]) -> None:
        for extend in EXTEND:
            extend(plan)


@pytest.fixture(autouse=True)
def own_things(monkeypatch: pytest.MonkeyPatch) -> Iterator[None]:
    for registry in (HANDLERS, MODELS):
        monkeypatch.setattr(registry, "_registered", dict(registry._registered))
    own_models.register()
    register_handler("change")(Change)
    yield
    CHANGE.clear()
    EXTEND.clear()


def problems(
    family: str = "llama3",
    *,
    tp: int = 1,
    pp: int = 1,
    layers: int = 2,
    handlers: Sequence[str] = ("change",),
) -> list[ConfigIssue]:
    config = JobConfig.model_validate(
        {
            "model": {
                "name": family,
                "handlers": handlers,
                "args": {"n_layers": layers, "dim": 32, "n_heads": 4},
            },
            "training": {"dataset": "stdlib", "seq_len": 32},
            "parallelism": {"tensor_parallel_degree": tp, "pipeline_parallel_degree": pp},
        }
    )
    return preflight(RunContext(config, tp * pp, "cpu"), [MODEL])


def test_both_ends_may_share_a_matrix() -> None:
    for degrees in ({"tp": 2}, {"pp": 2}, {"pp": 2, "tp": 2}):
        assert problems("tied naively", **degrees) == []


def test_an_embedding_with_more_than_the_shared_matrix_is_named() -> None:
    """The last stage would train a copy of the rest."""
    add("tok_embeddings.gain", (4,))
    [problem] = problems("tied naively", pp=2)
    assert problem.key == "parallelism.pipeline_parallel_degree"
    assert "tok_embeddings.weight, output.weight are one parameter, and" in problem.problem
    assert "stages 0, 1 would each train a copy" in problem.problem


def test_what_a_handler_shares_is_named_too() -> None:
    CHANGE.append(own_models.share)
    [problem] = problems(pp=2)
    assert "layers.0.attention.wo.weight, layers.1.attention.wo.weight are one" in problem.problem
    assert problems(pp=2, layers=4) == problems(tp=2) == [], "shared within a stage"


def test_a_parameter_of_no_stage_is_named() -> None:
    """All stages would keep it."""
    CHANGE.append(lambda model: model.register_parameter("gain", nn.Parameter(torch.empty(1))))
    [problem] = problems(pp=2)
    assert "gain is in no module of ModelArgs.modules()" in problem.problem


def test_a_start_refuses_it_on_every_rank() -> None:
    """Only the first one checks beforehand."""
    config, dims = Case(2, pp=2, family="shared by blocks").config(), ParallelDims(pp=2)
    with fake_world(rank=1, world_size=2):
        mesh = dims.build_mesh("cpu")
        with pytest.raises(
            ConfigError, match=r"layers\.0\.attention\.wo\.weight, layers\.1\..* are one"
        ):
            model_builder.build_model(
                config, 131, mesh, dims, torch.device("meta"), initialise=False
            )


def add(name: str, shape: tuple[int, ...], dtype: torch.dtype | None = None) -> None:
    """Let the handler add a parameter to the model."""
    module, _, key = name.rpartition(".")
    parameter = nn.Parameter(torch.empty(shape, dtype=dtype, device="meta"))
    CHANGE.append(lambda model: model.get_submodule(module).register_parameter(key, parameter))


STYLES = TensorStyles(2)


@pytest.mark.parametrize(
    ("name", "shape", "text"),
    [
        ("gain", (1,), "leaves out gain"),
        ("layers.0.feed_forward.w1.gain", (32,), "has no place for layers.0.feed_forward.w1.gain"),
        ("layers.1.attention.wo.gain", (32,), "no place for layers.1.attention.wo.gain"),
        ("layers.1.attention.wo.up", (32, 8), "layers.1.attention.wo.up, whose shape is [32, 8]"),
        ("layers.1.attention.wo.bias", (32,), None),
        ("layers.1.attention.wq.bias", (32,), None),
        ("layers.1.attention.wq.gain", (32,), None),
        ("layers.0.attention.gain", (8,), None),
        ("layers.0.ffn_norm.gain", (4,), None),
    ],
)
def test_a_parameter_that_the_plan_cannot_cut(
    name: str, shape: tuple[int, ...], text: str | None
) -> None:
    add(name, shape)
    found = problems(tp=2)
    assert len(found) == (text is not None)
    for problem in found:
        assert problem.key == "parallelism.tensor_parallel_degree"
        assert text is not None and text in problem.problem
    assert problems() == []


def test_a_style_may_hold_parameters_whole() -> None:
    add("layers.1.attention.wo.up", (32, 8))
    name = "layers.1.attention.wo"
    EXTEND.append(lambda plan: plan.update({name: replace(plan[name], whole=("up",))}))
    assert problems(tp=2) == []


def test_a_parameter_without_a_rule_is_named() -> None:
    """Before the start that would refuse it."""
    add("layers.1.ffn_norm.shift", (4,))
    [problem] = problems()
    assert "adds layers.1.ffn_norm.shift to the model" in problem.problem


def test_a_parameter_without_a_dimension_is_named() -> None:
    """On one process, too."""
    add("layers.1.feed_forward.gain", ())
    [problem] = problems()
    assert "layers.1.feed_forward.gain has none" in problem.problem


def test_a_warning_about_settings_hides_nothing() -> None:
    warning = ConfigIssue("handlers.warns", "is unusual", "", severity="warning")
    entry = HandlerEntry(Section, lambda: Change, check_static=lambda *_: [warning])
    HANDLERS.register("warns", entry, __name__)
    [problem] = problems("shared by blocks", pp=2, handlers=["warns", "change"])
    assert "are one parameter" in problem.problem


def test_a_parameter_of_another_type_is_named() -> None:
    """On one process, too; FSDP would say so at the first step, without a name."""
    add("layers.1.feed_forward.gain", (4,), torch.bfloat16)
    [problem] = problems()
    assert "layers.1.feed_forward.gain is bfloat16" in problem.problem
    assert "one type, here float32" in problem.problem
    CHANGE.append(lambda model: model.layers["1"].feed_forward.gain.requires_grad_(False))
    assert problems() == []


def tie(model: nn.Module, one: str, other: str) -> None:
    model.get_submodule(other).weight = model.get_submodule(one).weight


def test_what_is_shared_cannot_be_cut_in_two_ways() -> None:
    """A square matrix would be read as what it is not, without an error."""
    one, other = "layers.0.attention.wq", "layers.0.attention.wo"
    CHANGE.append(lambda model: tie(model, one, other))
    [problem] = problems(tp=2)
    assert f"cuts {one}.weight and {other}.weight, one parameter, in two ways" in problem.problem
    attention = "layers.0.attention"
    CHANGE[:] = [
        lambda model: setattr(model.get_submodule(attention), "wo", model.get_submodule(one))
    ]
    assert "a shared module, in two ways" in problems(tp=2)[0].problem


def test_a_style_for_no_module() -> None:
    EXTEND.append(lambda plan: plan.update({"layers.0.mlp": STYLES.norm()}))
    [problem] = problems(tp=2)
    assert "names layers.0.mlp: no such module" in problem.problem


def test_what_hooks_raise() -> None:
    """What is for the user stops a run; a hook may need what only a run has."""
    wrong = ConfigIssue("handlers.change", "is out of luck", "mend it")

    def refuse(model: nn.Module) -> None:
        raise ConfigError(wrong)

    def fail(model: nn.Module) -> None:
        raise RuntimeError("Default process group has not been initialized")

    CHANGE.append(refuse)
    assert problems(tp=2) == [wrong]
    CHANGE[:] = [fail]
    found = problems(pp=2)
    assert errors_of(found) == []
    assert "is not checked: the handler change" in found[0].problem
