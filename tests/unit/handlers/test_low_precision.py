"""Handlers for low precision before anything runs: what they refuse, and what they convert."""

import logging
import os
import subprocess
import sys
from importlib.util import find_spec
from typing import Any

import pytest
import torch
from torch import nn

from torchtitan.config import ConfigError, JobConfig
from torchtitan.config.facts import Facts
from torchtitan.distributed.parallel_dims import ParallelDims
from torchtitan.distributed.tensor_parallel import CutModule, GatherInput, TensorStyles
from torchtitan.handlers import checks
from torchtitan.handlers.linears import LinearHandler, swap_linears
from torchtitan.handlers.named import HandlerError, NamedHandler
from torchtitan.handlers.registry import HANDLERS, LOW_PRECISION
from torchtitan.models.registry import get_family
from torchtitan.preflight import MODEL, preflight


def config_of(
    handlers: list[str], settings: dict[str, Any] | None = None, **sections: Any
) -> JobConfig:
    return JobConfig.model_validate(
        {"model": {"handlers": handlers}, "handlers": settings or {}, **sections}
    )


def problems(
    handlers: list[str],
    settings: dict[str, Any] | None = None,
    device: str = "cuda",
    world_size: int = 1,
    **sections: Any,
) -> list[str]:
    config = config_of(handlers, settings, **sections)
    return [str(problem) for problem in checks.check(Facts(config, world_size, device))]


# what is refused


@pytest.mark.parametrize("name", LOW_PRECISION)
def test_they_pass(name: str) -> None:
    assert problems([name]) == []
    assert problems([name, "compile"]) == []


@pytest.mark.parametrize("name", LOW_PRECISION)
def test_without_torchao_one_sentence_names_the_extra(
    name: str, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr(
        checks, "find_spec", lambda package: None if package == "torchao" else find_spec(package)
    )
    assert problems([name]) == [
        f'model.handlers = "{name}": it needs torchao, which is not installed.'
        ' Fix: pip install "torchtitan[quant]".'
    ]


LACKING = """
import sys
from importlib.util import find_spec
from torchtitan.handlers import checks
checks.find_spec = lambda name: None if name == "torchao" else find_spec(name)
from torchtitan.cli import main
code = main(["train", "--model.handlers", "float8", *sys.argv[1:]])
looks = len(sys.argv) > 1  # builds the model, to find more problems
assert "torchao" not in sys.modules and (looks or "torch" not in sys.modules)
sys.exit(code)
"""


@pytest.mark.parametrize("flag", [[], ["--check"], ["--comm.mode=fake_backend"]])
def test_it_is_told_before_torch_is_imported(flag: list[str]) -> None:
    done = subprocess.run(
        [sys.executable, "-c", LACKING, *flag],
        env={**os.environ, "PYTHONPATH": os.pathsep.join(sys.path)},
        capture_output=True,
        text=True,
        timeout=60,
    )
    assert done.returncode == 2, done.stderr
    assert done.stderr.count("torchao") == 1 and "torchtitan[quant]" in done.stderr


@pytest.mark.parametrize("name", LOW_PRECISION)
def test_compile_comes_after(name: str) -> None:
    assert problems(["compile", name]) == [
        f'model.handlers = "compile": has to come after {name}. Fix: list {name} before compile.'
    ]


def test_a_model_has_one_format() -> None:
    for name in LOW_PRECISION:
        for other in set(LOW_PRECISION) - {name}:
            told = problems([name, other])
            assert any(f"cannot be combined with {other}" in text for text in told)


SENT = {"enable_fsdp_float8_all_gather": True}
PRECOMPUTED = {"precompute_float8_dynamic_scale_for_fsdp": True}
COPIES = {"data_parallel_replicate_degree": 2, "data_parallel_shard_degree": 1}


@pytest.mark.parametrize(
    ("name", "settings", "sections", "expected"),
    [
        ("float8", {"recipe_name": "rowwise", **SENT}, {}, "rowwise has one for each row"),
        ("float8", {"recipe_name": "rowwise_with_gw_hp", **SENT}, {}, "has one for each row"),
        ("float8", PRECOMPUTED, {}, "and none are"),
        ("float8", SENT, {"parallelism": COPIES}, "gather no weights"),
        (
            "float8",
            {"recipe_name": "rowwise_with_gw_hp", "filter_fqns": ["auto_filter_small_kn"]},
            {},
            "no figures for this recipe",
        ),
        ("float8", {"recipe_name": "columnwise"}, {}, "recipe_name"),
        (
            "float8",
            {},
            {"training": {"seq_len": 24, "local_batch_size": 1}},
            "1 x 24 tokens (context_parallel_degree = 1) has 24, and the handler float8 needs a"
            " multiple of 16",
        ),
        (
            "float8",
            {},
            {
                "training": {"seq_len": 48, "local_batch_size": 1},
                "parallelism": {"context_parallel_degree": 2},
            },
            "set it to a multiple of 32",
        ),
        ("mxfp8", {}, {"training": {"seq_len": 48, "local_batch_size": 1}}, "multiple of 32"),
        ("int8", {}, {"training": {"seq_len": 24, "local_batch_size": 1}}, "multiple of 16"),
        (
            "int8",
            {"output": False, "grad_input": False, "grad_weight": False},
            {},
            "no product of it is one of integers",
        ),
        (
            "bitnet",
            {},
            {"parallelism": {"tensor_parallel_degree": 2}},
            "the model would depend on the mesh",
        ),
        *(
            (name, {}, {"training": {"mixed_precision_param": "float64"}}, "at most 32 bits")
            for name in LOW_PRECISION
        ),
    ],
)
def test_what_cannot_work_is_refused(
    name: str, settings: dict[str, Any], sections: dict[str, Any], expected: str
) -> None:
    [told] = problems([name], {name: settings}, world_size=2, **sections)
    assert expected in told


@pytest.mark.parametrize(
    ("settings", "sections"),
    [
        ({"recipe_name": "rowwise_with_gw_hp"}, {"seq_len": 24, "local_batch_size": 1}),
        ({"emulate": True}, {"seq_len": 24, "local_batch_size": 1}),
        ({"emulate": True}, {"mixed_precision_param": "float64"}),
        ({}, {"seq_len": 24, "local_batch_size": 2}),
    ],
)
def test_what_float8_can_do_is_not(settings: dict[str, Any], sections: dict[str, Any]) -> None:
    assert problems(["float8"], {"float8": settings}, training=sections) == []


def test_copies_of_shards_may_be_sent_in_float8() -> None:
    copies = {"data_parallel_replicate_degree": 2, "data_parallel_shard_degree": 2}
    assert problems(["float8"], {"float8": SENT}, world_size=4, parallelism=copies) == []


def test_a_pipeline_s_microbatches_count() -> None:
    training = {"seq_len": 24, "local_batch_size": 4}
    pipeline = {"pipeline_parallel_degree": 2, "pipeline_parallel_microbatch_size": 1}
    [told] = problems(["float8"], world_size=2, training=training, parallelism=pipeline)
    assert "microbatch of 1 x 24 tokens" in told


def test_mxfp8_is_refused_on_cpus() -> None:
    [told] = problems(["mxfp8"], device="cpu")
    assert "needs the units of Blackwell GPUs, and this run is on CPUs" in told
    assert "mxfp8_emulated" in told
    assert problems(["mxfp8"], {"mxfp8": {"recipe_name": "mxfp8_emulated"}}, device="cpu") == []


@pytest.mark.parametrize(
    ("name", "settings", "capability", "is_refused"),
    [
        ("float8", {}, (8, 0), True),
        ("float8", {"emulate": True}, (8, 0), False),
        ("float8", {}, (8, 9), False),
        ("float8", {}, (9, 0), False),
        ("mxfp8", {}, (9, 0), True),
        ("mxfp8", {"recipe_name": "mxfp8_emulated"}, (9, 0), False),
        ("mxfp8", {}, (10, 0), False),
        ("mxfp8", {}, (12, 0), False),
        ("int8", {}, (8, 0), False),
        ("bitnet", {}, (8, 0), False),
    ],
)
def test_gpus_without_the_units_are_refused(
    name: str,
    settings: dict[str, Any],
    capability: tuple[int, int],
    is_refused: bool,
    monkeypatch: pytest.MonkeyPatch,
) -> None:
    monkeypatch.setattr(torch.cuda, "device_count", lambda: 1)
    monkeypatch.setattr(torch.cuda, "get_device_capability", lambda rank: capability)
    for variable in ("RANK", "WORLD_SIZE", "LOCAL_RANK"):
        monkeypatch.delenv(variable, raising=False)
    told = checks.probe(Facts(config_of([name], {name: settings}), 1, "cuda"))
    assert bool(told) == is_refused
    if is_refused:
        number = ".".join(map(str, capability))
        assert f"the GPU has compute capability {number}, and it needs" in str(told[0])


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


def test_what_does_not_fit_is_counted_and_told_once(caplog: pytest.LogCaptureFixture) -> None:
    caplog.set_level(logging.INFO)
    model = build(ffn_dim=72)
    handler_of("float8", filter_fqns=["layers.1.attention.w"]).convert(model)
    [told] = [record.message for record in caplog.records if "linears" in record.message]
    assert told == (
        "float8: 4 linears; 4 left as they are by filter_fqns; 6 left as they are, since a"
        " dimension is no multiple of 16 (layers.0.feed_forward.w1, layers.0.feed_forward.w2,"
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
def test_a_filter_for_nothing_is_found_by_the_check(name: str) -> None:
    config = config_of([name], {name: {"filter_fqns": ["attention.wx", "output", "layer.0"]}})
    found = preflight(Facts(config, 1, "cuda", full=False), [MODEL])
    assert [problem.value for problem in found] == ["attention.wx", "layer.0"]
    assert {problem.key for problem in found} == {f"handlers.{name}.filter_fqns"}


def test_nothing_left_is_refused() -> None:
    with pytest.raises(ConfigError, match="it finds no linear: 14 are left out by filter_fqns"):
        handler_of("int8", filter_fqns=["layers"]).convert(build())


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
