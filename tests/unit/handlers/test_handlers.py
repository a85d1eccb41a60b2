"""Handlers: finding, checking, and acting around a real training step."""

import os
import sys
from collections.abc import Callable
from pathlib import Path
from typing import Any

import pytest
import torch
from pydantic import field_validator
from torch import nn

from tests.distributed import runs
from tests.forked import execute
from torchtitan.cli import main
from torchtitan.commands.config import json_schema, named_tables
from torchtitan.config import ConfigError, ConfigIssue, JobConfig
from torchtitan.config.help_text import print_help
from torchtitan.config.run_context import RunContext
from torchtitan.config.schema import Section
from torchtitan.distributed.context import fake_world
from torchtitan.distributed.parallel_dims import ParallelDims
from torchtitan.handlers import registry
from torchtitan.handlers.base import ModelHandler
from torchtitan.handlers.named import HandlerError, NamedHandler
from torchtitan.preflight import MODEL, preflight
from torchtitan.preflight.handlers import check_environment, check_static
from torchtitan.training import model_builder


@pytest.fixture(autouse=True)
def restored(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(registry.HANDLERS, "_registered", dict(registry.HANDLERS._registered))


def problems(chosen: list[str], settings: dict[str, dict[str, object]] | None = None) -> list[str]:
    config = JobConfig.model_validate({"model": {"handlers": chosen}, "handlers": settings or {}})
    return [str(problem) for problem in check_static(RunContext(config, 1, "cpu"))]


class Settings(Section):
    amount: int = 1
    """How much."""


class Nothing(ModelHandler):
    """A handler that does nothing."""

    after = ("compile",)
    Settings = Settings


def test_known_handlers_pass() -> None:
    assert problems(["compile"], {"compile": {"backend": "eager"}}) == []


def test_a_table_of_a_handler_that_is_not_listed_is_a_warning() -> None:
    [text] = problems([], {"compile": {"backend": "eager"}})
    assert text.startswith('handlers.compile: has no effect: "compile" is not in model.handlers')


@pytest.mark.parametrize(
    ("chosen", "settings", "expected"),
    [
        (["compil"], {}, ['model.handlers = "compil"', "compile"]),
        (["compile", "compile"], {}, ["twice"]),
        ([], {"compiel": {}}, ["handlers.compiel", "compile"]),
        (["compile"], {"compile": {"backnd": "x"}}, ["handlers.compile.backnd", "backend"]),
        (["compile"], {"compile": {"backnd": "x"}}, ['did you mean "backend"?']),
        (["compile"], {"compile": {"backend": "foo"}}, ['backend = "foo": is not a choice']),
        ([], {"compile": {"backend": 3}}, ["handlers.compile.backend = 3: is not a choice"]),
    ],
)
def test_mistakes_are_named(
    chosen: list[str], settings: dict[str, dict[str, object]], expected: list[str]
) -> None:
    (text,) = problems(chosen, settings)
    for part in expected:
        assert part in text


def test_order_and_exclusion() -> None:
    registry.register_handler("nothing")(Nothing)
    assert problems(["compile", "nothing"]) == []
    assert "list compile before nothing" in problems(["nothing", "compile"])[0]
    lonely = type("Lonely", (Nothing,), {"after": (), "excludes": ("compile",)})
    registry.register_handler("lonely")(lonely)
    assert "cannot be combined with compile" in problems(["lonely", "compile"])[0]
    assert problems(["lonely"]) == []


class Unrelated:
    """Has the hooks, but not the base class."""

    def convert(self, model: object) -> None: ...

    pre_optimizer_hook = post_optimizer_hook = convert


def test_a_handler_inherits_from_the_base_class() -> None:
    """Registered as it is, or imported when it is used."""
    with pytest.raises(TypeError, match="unrelated is not a subclass of ModelHandler: inherit"):
        registry.register_handler("unrelated")(Unrelated)
    entry = registry.HandlerEntry(Section, lambda: Unrelated)  # type: ignore[arg-type, return-value]
    registry.HANDLERS.register("late", entry, "my.module")
    with pytest.raises(HandlerError, match=r"late .* in __init__: TypeError: .*inherit from"):
        NamedHandler("late", JobConfig(), ParallelDims())


@pytest.mark.parametrize("rule", ["after", "excludes"])
def test_a_rule_is_a_tuple_of_names(rule: str) -> None:
    """The letters of a text would be taken for names, and the rule would never act."""
    text: dict[str, Any] = {rule: "compile"}
    things = type("H", (Nothing,), text), registry.HandlerEntry(Section, lambda: Any, **text)
    for thing in things:
        with pytest.raises(TypeError, match=f"{rule} of the handler text has to be a tuple"):
            registry.HANDLERS.register("text", thing, "a.module")


def fails(context: RunContext, settings: object) -> list[ConfigIssue]:
    raise KeyError("what it looks for")


class Fussy(Section):
    amount: int = 1
    """How much."""

    @field_validator("amount")
    @classmethod
    def _look(cls, value: int) -> int:
        raise KeyError("what it looks for")


def test_what_a_check_raises_names_the_handler() -> None:
    entries: dict[str, registry.HandlerEntry] = {
        "check_static": registry.HandlerEntry(Section, lambda: Any, check_static=fails),
        "Settings": registry.HandlerEntry(Fussy, lambda: Any),
    }
    for what, entry in entries.items():
        registry.HANDLERS.register(f"bad_{what}", entry, "my.module")
        settings: dict[str, object] = {"amount": 2} if entry.settings is Fussy else {}
        [text] = problems([f"bad_{what}"], {f"bad_{what}": settings})
        assert f'"bad_{what}": its {what} (my.module) fails' in text
        assert "KeyError: 'what it looks for'" in text
    silent = registry.HandlerEntry(Section, lambda: Any, check_environment=fails)
    registry.HANDLERS.register("bad_probe", silent, "my.module")
    config = JobConfig.model_validate({"model": {"handlers": ["bad_probe"]}})
    [problem] = check_environment(RunContext(config, 1, "cpu", full=True))
    assert "its check_environment (my.module) fails" in str(problem)


@pytest.mark.parametrize("package", ["no_such_package", "no_such_package.part"])
def test_a_package_that_is_not_installed(package: str) -> None:
    entry = registry.HandlerEntry(Section, lambda: Any, package=package)
    registry.HANDLERS.register("needy", entry, "my.module")
    [text] = problems(["needy"])
    assert f"it needs {package}, which is not installed. Fix: pip install {package}" in text


def test_settings_of_a_registered_handler() -> None:
    registry.register_handler("nothing")(Nothing)
    config = JobConfig.model_validate({"handlers": {"nothing": {"amount": 3}}})
    settings = registry.handler_settings(config, "nothing")
    assert isinstance(settings, Settings)
    assert settings.amount == 3


@pytest.mark.parametrize(
    ("amount", "expected"),
    [
        ("two", "needs an integer, and this is text. Fix: write an integer, for example 1"),
        ("2", "needs an integer, and this is text. Fix: write an integer, for example 1, without"),
        (True, "needs an integer, and this is a boolean."),
    ],
)
def test_wrong_types_of_a_registered_handler_in_words(amount: object, expected: str) -> None:
    registry.register_handler("nothing")(Nothing)
    (text,) = problems([], {"nothing": {"amount": amount}})
    assert text.startswith("handlers.nothing.amount = ")
    assert expected in text


class Odd(Section):
    anything: int | str = 1
    """Of a type that the table of keys has no word for."""


def test_types_that_toml_has_no_word_for_are_refused_all_the_same() -> None:
    registry.register_handler("nothing")(type("OddHandler", (Nothing,), {"Settings": Odd}))
    assert all(
        "handlers.nothing.anything" in text for text in problems([], {"nothing": {"anything": []}})
    )
    assert problems([], {"nothing": {"anything": []}})


FREEZE = """
import torch

from torchtitan.config.schema import Section
from torchtitan.handlers.base import ModelHandler
from torchtitan.handlers.registry import handler_settings, register_handler


@register_handler("freeze_one")
class Freeze(ModelHandler):
    class Settings(Section):
        name: str = "norm.weight"

    def __init__(self, job_config, parallel_dims):
        self.name = handler_settings(job_config, "freeze_one").name
        self.calls = []

    def convert(self, model):
        assert all(p.is_meta for p in model.parameters())
        model.get_parameter(self.name).requires_grad_(False)
        self.calls.append("convert")

    def pre_optimizer_hook(self, model):
        assert model.get_parameter(self.name).grad is None
        assert model.get_parameter("output.weight").grad is not None
        self.calls.append("pre")

    def post_optimizer_hook(self, model):
        self.calls.append("post")
        print("CALLS", " ".join(self.calls), flush=True)

    def after_load(self, model):
        self.calls.append("loaded")
        norm = model.get_parameter(self.name).full_tensor()
        print("NORM", norm.mean().item(), flush=True)
        print("DETERMINISTIC", torch.are_deterministic_algorithms_enabled(), flush=True)
        print("WARNS", torch.is_deterministic_algorithms_warn_only_enabled(), flush=True)
        print("THREADS", torch.get_num_threads(), flush=True)
"""


def test_handler_of_ones_own_acts_in_a_run(tmp_path: Path) -> None:
    """Registered by `job.custom_import`: its change trains, its hooks run around every step, and
    after weights are there, on a resume too. It also sees the process as it was set up."""
    module = tmp_path / "my_handler.py"
    module.write_text(FREEZE)
    settings = (
        "--job.custom_import=my_handler",
        "--model.handlers=freeze_one",
        "--handlers.freeze_one.name=layers.1.ffn_norm.weight",
        "--debug.deterministic",
        "--debug.threads=3",
    )
    env = {**runs.environment(), "PYTHONPATH": os.pathsep.join([str(tmp_path), *sys.path])}

    def output(*more: str) -> str:
        command = runs.command(tmp_path / "run", *settings, *more)
        done = execute(command, env=env)
        assert done.returncode == 0, done.stderr
        return done.stdout

    first = output("--training.steps=2", "--lr_scheduler.warmup_steps=1")
    assert "CALLS convert loaded pre post pre post" in first
    assert "NORM 1.0\n" in first
    assert "DETERMINISTIC True" in first and "WARNS False" in first
    assert "THREADS 3" in first
    more = ("--training.steps=3", "--lr_scheduler.warmup_steps=1")
    resumed = output(*more, "--debug.deterministic_warn_only")
    assert "DETERMINISTIC True" in resumed and "WARNS True" in resumed
    assert "NORM 1.0\n" in resumed
    assert "CALLS convert loaded pre post\n" in resumed


def test_help_and_schema_show_the_settings_of_a_module(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str]
) -> None:
    (tmp_path / "my_handler.py").write_text(FREEZE)
    monkeypatch.syspath_prepend(tmp_path)

    def output(*more: str) -> str:
        assert main(["train", "--help", "all", *more]) == 0
        return capsys.readouterr().out

    own, built_in = "--handlers.freeze_one.name", "--handlers.float8.recipe_name"
    plain = output()
    assert built_in in plain and own not in plain
    shown = output("--job.custom_import=my_handler")
    assert built_in in shown and own in shown
    assert own in output("--job.custom_import=my_handler", "--check")


def test_the_schema_knows_settings() -> None:
    registry.register_handler("nothing")(Nothing)
    schema: dict = json_schema()  # type: ignore[type-arg]
    handlers = schema["properties"]["handlers"]["properties"]
    assert handlers["nothing"]["properties"]["amount"]["type"] == "integer"
    assert "tensorwise" in handlers["float8"]["properties"]["recipe_name"]["enum"]
    registry.register_handler("odd")(type("OddHandler", (Nothing,), {"Settings": Odd}))
    print_help(named_tables())  # what has no word in TOML is left out


@pytest.mark.filterwarnings("error")
def test_settings_of_others_do_not_get_into_each_others_way(
    capsys: pytest.CaptureFixture[str],
) -> None:
    """Inner classes of the same name, and a type that JSON has no word for."""
    for name, kind in (("first", int), ("second", str)):
        space: dict[str, Any] = {"__annotations__": {"value": kind}, "__module__": __name__}
        inner = type("Inner", (Section,), space)
        space = {"__annotations__": {"inner": inner | None}, "inner": None, "__module__": __name__}
        registry.HANDLERS.register(
            name, registry.HandlerEntry(type("Outer", (Section,), space), lambda: Any), __name__
        )

    class Odd(Section):
        function: Callable[[int], int] = abs
        """What JSON cannot hold."""
        on: bool = False
        """A switch."""
        names: tuple[str, ...] = ()
        """A list."""

    registry.HANDLERS.register("odd", registry.HandlerEntry(Odd, lambda: Any), __name__)
    schema: Any = json_schema()
    kinds = [schema["$defs"][f"handlers.{name}.Inner"] for name in ("first", "second")]
    assert [kind["properties"]["value"]["type"] for kind in kinds] == ["integer", "string"]
    settings = schema["properties"]["handlers"]["properties"]
    assert {"$ref": "#/$defs/handlers.second.Inner"} in settings["second"]["properties"]["inner"][
        "anyOf"
    ]
    assert settings["odd"] == {"type": "object"}
    print_help(named_tables())
    text = capsys.readouterr().out
    assert "--handlers.freeze.patterns TOML" in text, "a list takes brackets there"
    assert "--handlers.int8.output TOML" in text, "and a switch its value"


class Misled(Nothing):
    """Misunderstands each member that it has."""

    after = ()

    def check(self, model: nn.Module) -> list[str]:  # type: ignore[override]
        return ["the model looks odd"]

    def convert(self, model: object) -> nn.Module:  # type: ignore[override]
        assert isinstance(model, nn.Module)
        model.requires_grad_(False)
        return nn.Sequential(model)


def test_what_a_handler_returns_in_vain_is_refused() -> None:
    """Without a word, the run would train a model without it."""
    registry.register_handler("misled")(Misled)
    handler = NamedHandler("misled", JobConfig(), ParallelDims())
    named = rf"the handler misled \({__name__}\), in "
    with pytest.raises(HandlerError, match=named + "check: TypeError: 'the model looks odd' is"):
        handler.check(nn.Linear(1, 1))
    with pytest.raises(HandlerError, match=named + "convert: TypeError: it returns another model"):
        handler.convert(nn.Linear(1, 1))


def test_handlers_have_to_leave_something_to_train() -> None:
    class FreezesAll(Misled):
        def convert(self, model: object) -> None:  # type: ignore[override]
            assert isinstance(model, nn.Module)
            model.requires_grad_(False)

    registry.register_handler("freezes_all")(FreezesAll)
    config = JobConfig.model_validate({"model": {"handlers": ["freezes_all"]}})
    dims = ParallelDims()
    with fake_world(0, 1):
        mesh = dims.build_mesh("cpu")
        with pytest.raises(ConfigError, match="leave no parameter to train"):
            model_builder.build_model(
                config, 64, mesh, dims, torch.device("meta"), initialise=False
            )


def test_what_a_handler_of_ones_own_adds_may_be_named() -> None:
    """By those that come after it, which judge the model as it is then."""

    class Adds(Nothing):
        def convert(self, model: object) -> None:  # type: ignore[override]
            assert isinstance(model, nn.Module)
            model.added = nn.Linear(16, 16, bias=False)

    registry.register_handler("adds")(type("Adds", (Adds,), {"after": ()}))
    settings = {"freeze": {"patterns": ["added.*", "misspelt.*"]}}
    sections = {"model": {"handlers": ["adds", "freeze"]}, "handlers": settings}
    config = JobConfig.model_validate(sections)
    [problem] = preflight(RunContext(config, 1, "cpu", full=False), [MODEL])
    assert problem.value == "misspelt.*"
    handlers = [NamedHandler(name, config, ParallelDims()) for name in config.model.handlers]
    model = nn.Sequential(nn.Linear(1, 1))
    handlers[0].convert(model)
    with pytest.raises(ConfigError, match="misspelt"):
        handlers[1].convert(model)
    settings["freeze"]["patterns"].pop()
    NamedHandler("freeze", JobConfig.model_validate(sections), ParallelDims()).convert(model)
    assert [tensor.requires_grad for tensor in model.parameters()] == [True, True, False]
