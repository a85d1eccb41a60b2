"""Handlers for low precision before anything runs: what they convert, and how it is cut."""

import logging
from typing import Any

import pytest
import torch
from torch import nn

from tests.unit.handlers.test_low_precision import SENT, config_of
from torchtitan.config import ConfigError
from torchtitan.distributed.parallel_dims import ParallelDims
from torchtitan.handlers.linears import LinearHandler, swap_linears
from torchtitan.handlers.named import HandlerError, NamedHandler
from torchtitan.handlers.registry import HANDLERS, LOW_PRECISION
from torchtitan.models.registry import get_family
from torchtitan.parallel.tensor_parallel import CutModule, GatherInput, TensorStyles

# what is converted


def build(**args: Any) -> nn.Module:
    family = get_family("llama3")
    sizes = {"dim": 64, "ffn_dim": 128, "n_layers": 2, "n_heads": 4, "n_kv_heads": 2, **args}
    with torch.device("meta"):
        return family.build(family.resolve_args("debugmodel", sizes, 131))


def handler_of(name: str, dims: ParallelDims | None = None, **settings: Any) -> NamedHandler:
    if name == "mxfp8":
        settings.setdefault("recipe_name", "mxfp8_emulated")
    config = config_of([name], {name: settings})
    return NamedHandler(name, config, dims or ParallelDims())


def linears(model: nn.Module) -> dict[str, str]:
    """The classes of linears by name."""
    return {
        name: type(module).__name__
        for name, module in model.named_modules()
        if isinstance(module, nn.Linear)
    }


@pytest.mark.parametrize("name", LOW_PRECISION)
def test_names_and_shapes_stay(name: str) -> None:
    model, plain = build(), build()
    handler_of(name).convert(model)
    shapes, expected = (
        {key: (value.shape, value.dtype, value.device) for key, value in part.state_dict().items()}
        for part in (model, plain)
    )
    assert shapes == expected
    assert list(dict(model.named_parameters())) == list(dict(plain.named_parameters()))
    kinds = linears(model)
    assert kinds.pop("output") == "Head"
    assert len(kinds) == 14 and len(set(kinds.values())) == 1 and "Linear" not in kinds.values()


@pytest.mark.parametrize("settings", [{}, SENT])
def test_what_is_shared_stays_shared(settings: dict[str, Any]) -> None:
    """A linear, and a weight of two linears; the latter also where weights become others."""
    model = build()
    first, second = (model.get_submodule(f"layers.{n}.attention") for n in range(2))
    second.wq = first.wq
    second.wo.weight = first.wo.weight  # type: ignore[union-attr]
    handler_of("float8", **settings).convert(model)
    assert second.wq is first.wq and type(first.wq).__name__ == "Float8Linear"
    assert second.wo is not first.wo and type(second.wo).__name__ == "Float8Linear"
    assert second.wo.weight is first.wo.weight


def test_what_does_not_fit_is_counted_and_told_once(caplog: pytest.LogCaptureFixture) -> None:
    caplog.set_level(logging.INFO)
    model = build(ffn_dim=72)
    handler_of("float8", filter_fqns=["layers.1.attention.w"]).convert(model)
    [told] = [record.message for record in caplog.records if "linears" in record.message]
    assert told == (
        "float8: 4 linears; 4 skipped by filter_fqns; 6 skipped because a dimension is not a"
        " multiple of 16 (layers.0.feed_forward.w1, layers.0.feed_forward.w2,"
        " layers.0.feed_forward.w3, ...)"
    )
    converted = [key for key, kind in linears(model).items() if kind == "Float8Linear"]
    assert converted == [f"layers.0.attention.{key}" for key in ("wq", "wk", "wv", "wo")]


def test_torchao_s_own_filter(caplog: pytest.LogCaptureFixture) -> None:
    model = build(dim=2048, ffn_dim=8192, n_heads=16, n_kv_heads=4)
    filters = ["auto_filter_small_kn", "w2"]
    handler_of("float8", recipe_name="rowwise", filter_fqns=filters).convert(model)
    converted = [key for key, kind in linears(model).items() if kind == "Float8Linear"]
    assert converted == [f"layers.{n}.feed_forward.{key}" for n in (0, 1) for key in ("w1", "w3")]


def test_a_filter_for_nothing_is_refused() -> None:
    with pytest.raises(ConfigError, match=r"is part of no module's name.*atention|attention"):
        handler_of("float8", filter_fqns=["atention"]).convert(build())


@pytest.mark.parametrize("name", LOW_PRECISION)
def test_nothing_left_is_refused(name: str) -> None:
    """By the check, too, which leaves the model as it is."""
    handler, model = handler_of(name, filter_fqns=["layers"]), build()
    with pytest.raises(ConfigError, match="no linear to convert: filter_fqns skips 14"):
        handler.convert(model)
    [problem] = handler.check(model)
    assert problem.problem.startswith("it finds no linear to convert: filter_fqns skips 14")
    kinds = linears(model)
    assert handler_of(name).check(model) == [] and linears(model) == kinds


def test_nothing_left_of_what_is_large_is_refused() -> None:
    handler = handler_of("float8", recipe_name="rowwise", filter_fqns=["auto_filter_small_kn"])
    [problem] = handler.check(build())
    assert problem.problem.startswith("it finds no linear to convert: filter_fqns skips 14")


class Breaking(LinearHandler):
    name = "int8"
    multiple = 1

    def swap(self, name: str, linear: nn.Linear) -> nn.Linear:
        raise KeyError("no such thing")


def test_an_error_names_handler_hook_and_module(monkeypatch: pytest.MonkeyPatch) -> None:
    handler = handler_of("int8")
    handler.handler = Breaking(config_of(["int8"]), ParallelDims())
    with pytest.raises(HandlerError, match=r"int8 \(.*\), in convert.*layers\.0\.attention\.wq"):
        handler.convert(build())


def test_other_classes_are_left_alone() -> None:
    model = build()
    assert "output" not in swap_linears(model, lambda name, linear: linear, lambda *_: True)


# how tensor parallelism cuts it


def plan_of(name: str, degree: int, **settings: Any) -> Any:
    model = build()
    handler = handler_of(name, ParallelDims(tp=degree), **settings)
    handler.convert(model)
    plan = model.tensor_parallel_plan(TensorStyles(degree))  # type: ignore[operator]
    handler.extend_tp_plan(plan)
    return plan


@pytest.mark.parametrize("name", ["float8", "int8", "mxfp8"])
def test_parts_that_do_not_fit_are_refused(name: str) -> None:
    with pytest.raises(ConfigError, match=r"the part of layers\.0\.attention\.\w+ on each rank is"):
        plan_of(name, 4 if name == "mxfp8" else 8)


def test_a_rank_s_share_of_heads_counts() -> None:
    """Two heads of keys on four ranks: each rank multiplies with the 16 rows of one."""
    assert plan_of("float8", 4)
    styles = TensorStyles(4)
    assert styles.colwise(units=2).part_of(32, 64, 4) == (16, 64)
    assert styles.colwise().part_of(64, 32, 4) == (16, 32)
    assert styles.rowwise().part_of(64, 32, 4) == (64, 8)
    assert styles.norm().part_of(64, 32, 4) == (64, 32)


def gathers_in_float8(plan: Any) -> list[str]:
    return [
        name
        for name, style in plan.items()
        if issubclass(style.mixin, CutModule) and style.mixin.__name__ == "GatherFloat8Input"
    ]


def test_one_scale_is_sent_rounded() -> None:
    blocks = [f"layers.{n}.{key}" for n in (0, 1) for key in ("attention", "feed_forward")]
    assert gathers_in_float8(plan_of("float8", 2)) == blocks
    assert gathers_in_float8(plan_of("float8", 2, recipe_name="rowwise")) == []
    plan = plan_of("float8", 2, filter_fqns=["wk", "layers.1.feed_forward"])
    assert gathers_in_float8(plan) == ["layers.0.feed_forward"]
    assert plan["output"].mixin is GatherInput


def test_shards_of_another_size_are_not_sent_in_float8() -> None:
    with pytest.raises(ConfigError, match=r"64 rows of layers\.0\.attention\.wq .* over 24 ranks"):
        handler_of("float8", ParallelDims(dp_shard=24), **SENT).convert(build())
    for shards in (8, 32):
        model, dims = build(), ParallelDims(dp_shard=shards, tp=2)
        handler = handler_of("float8", dims, **SENT)
        handler.convert(model)
        plan = model.tensor_parallel_plan(TensorStyles(2))  # type: ignore[operator]
        if shards == 8:
            handler.extend_tp_plan(plan)
            continue
        with pytest.raises(ConfigError, match=r"16 rows of layers\.0\.attention\.wk .* over 32"):
            handler.extend_tp_plan(plan)


def test_they_are_all_tested() -> None:
    from tests.distributed.low_precision import VARIANTS

    assert {name for name, _ in VARIANTS.values()} == set(LOW_PRECISION)
    assert set(LOW_PRECISION) <= set(HANDLERS)
