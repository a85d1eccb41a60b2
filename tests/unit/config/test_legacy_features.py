"""Features under older keys: those that are handlers today, and those that are not built."""

from functools import partial
from typing import Any

import pytest
from old_keys import problem_of, value_of

from torchtitan.config.compat import keys as tables
from torchtitan.config.fields import known_keys
from torchtitan.config.load import load_config
from torchtitan.config.run_context import RunContext
from torchtitan.preflight.handlers import check_static

# handlers


@pytest.mark.parametrize("switch", ["training.compile", "compile.enable"])
def test_compile_is_a_handler(switch: str, load):
    loaded = load({switch: True, "compile.backend": "eager", "compile.components": ["model"]})
    assert loaded.config.model.handlers == ("compile",)
    assert loaded.config.handlers == {"compile": {"backend": "eager"}}
    assert f'{switch} is "compile" in model.handlers today' in loaded.notices
    assert load({switch: False}).config.model.handlers == ()
    assert load({switch: False}).notices == ()
    flag = load({}, f"--{switch}")
    assert flag.config.model.handlers == ("compile",)
    assert flag.origins["model.handlers"] == "command line"
    assert load({switch: True}, f"--{switch}", "false").config.model.handlers == ()
    assert load({"model.handlers": ["compile"]}, f"--no-{switch}").config.model.handlers == ()
    assert load({switch: True}, "--model.handlers", "[]").config.model.handlers == ()
    assert "needs true or false" in problem_of(partial(load, {switch: "yes"}))
    together = {switch: True, "model.handlers": ["compile"]}
    assert "is model.handlers today" in problem_of(partial(load, together))


def test_compiling_the_loss_alone_is_refused(load):
    keys = {"compile.components": ["loss"], "compile.enable": True}
    assert "compiles the blocks" in problem_of(partial(load, keys))
    load({**keys, "compile.enable": False})


def test_settings_of_a_handler_that_is_not_used_are_left_out(load):
    loaded = load(
        {"compile.backend": "eager", "float8.filter_fqns": ["output"], "mx.filter_fqns": []}
    )
    assert loaded.config.handlers == {} and loaded.notices == ()


@pytest.mark.parametrize(
    ("switch", "table"),
    [
        ({"float8.enable_float8_linear": True}, "float8"),
        ({"model.converters": ["float8"]}, "float8"),
        ({"model.converters": ["quantize.linear.float8"]}, "quantize.linear.float8"),
    ],
)
def test_float8_is_a_handler(switch, table, load):
    keys = {**switch, f"{table}.recipe_name": "rowwise", "training.compile": True}
    loaded = load({**keys, f"{table}.filter_fqns": ["output"]})
    assert loaded.config.model.handlers == ("float8", "compile")
    expected = {"recipe_name": "rowwise", "filter_fqns": ["output"]}
    assert loaded.config.handlers == {"float8": expected}
    assert check_static(RunContext(loaded.config, 1, "cuda")) == []


@pytest.mark.parametrize("converter", ["mx", "quantize.linear.mx"])
def test_mx_is_the_handler_mxfp8(converter, load):
    keys = {"mx.recipe_name": "mxfp8", "mx.use_fp8_dim1_cast_triton_kernel": False}
    expected = {"recipe_name": "mxfp8_cublas", "mxfp8_dim1_cast_kernel_choice": "torch"}
    if converter != "mx":
        keys = {f"{converter}.{name}": value for name, value in expected.items()}
    loaded = load({"model.converters": [converter], **keys})
    assert loaded.config.model.handlers == ("mxfp8",)
    assert loaded.config.handlers == {"mxfp8": expected}
    assert check_static(RunContext(loaded.config, 1, "cuda")) == []


def test_a_setting_that_torchao_has_no_more_changes_nothing(load):
    loaded = load({"float8.force_recompute_fp8_weight_in_bwd": True})
    assert "torchao no longer has it" in loaded.notices[0]


@pytest.mark.parametrize("name", ["quantize.grouped_mm.float8", "quantize.grouped_mm.mx"])
def test_converters_of_experts_are_refused(name: str, load):
    loaded = load({"model.converters": [name]})
    (issue,) = check_static(RunContext(loaded.config, 1, "cuda"))
    assert str(issue).startswith(f'model.handlers = "{name}": is not a handler')


# not built


def switches() -> list[tuple[str, Any]]:
    return [
        (name, value)
        for feature in tables.NOT_BUILT
        for name, off in feature.switches.items()
        for value in [on(off[0])]
    ]


def on(off: Any) -> Any:
    if isinstance(off, bool):
        return not off
    return off + 2 if isinstance(off, int) else ["on"] if isinstance(off, list) else "on"


@pytest.mark.parametrize(("name", "value"), switches())
def test_a_feature_that_is_not_built_is_refused_by_name(name: str, value: Any, load):
    (feature,) = [item for item in tables.NOT_BUILT if name in item.switches]
    problem = problem_of(partial(load, {name: value}))
    assert problem.startswith(f"{name} = ")
    assert f"this library does not have {feature.name} yet. Fix: " in problem
    text = ",".join(value) if isinstance(value, list) else str(value)
    assert problem_of(partial(load_config, [f"--{name}", text])).startswith(f"--{name} = ")
    for off in feature.switches[name]:
        assert load({name: off}).notices == ()


def test_settings_of_a_feature_that_is_off_say_nothing(load):
    keys = {name: on(default) for name, default in tables.NOT_BUILT_SETTINGS.items()}
    assert len(keys) > 10
    assert load(keys).notices == ()


def test_metrics_of_all_ranks_are_the_opposite_of_rank_0_only(load):
    if "metrics.save_for_all_ranks" in known_keys():
        loaded = load({"metrics.rank_0_only": False})
        assert value_of(loaded, "metrics.save_for_all_ranks") is True
        return
    assert load({"metrics.rank_0_only": True}).notices == ()
    problem = problem_of(partial(load, {"metrics.rank_0_only": False}))
    assert problem.startswith("metrics.rank_0_only = false: this library does not have metrics of")
    assert "set it to" not in problem  # true is off


def test_a_choice_that_is_not_built_is_refused(load):
    problem = problem_of(partial(load, {"comm.mode": "local_tensor"}))
    assert problem.startswith('comm.mode = "local_tensor": is not a choice. Fix: choose from')


@pytest.mark.parametrize("name", tables.IGNORED)
def test_what_changes_nothing_is_ignored(name: str, load):
    reason = tables.REASONS.get(name)
    notices = load({name: True if tables.IGNORED[name] is False else "x"}).notices
    assert notices == ((f"{name} is not needed: {reason}",) if reason else ())


def test_seconds_are_refused_with_the_reason(load):
    problem = problem_of(partial(load, {"checkpoint.interval_type": "seconds"}))
    assert "set checkpoint.interval to a number of steps" in problem and "clocks differ" in problem
