"""Handlers by name. No torch: a handler's code is imported when it is used, its settings before.

A third party adds one by the decorator `register_handler` in a module that `job.custom_import`
names, or by an entry point of the group `torchtitan.handlers`, which gives the class, or (so that
checking a config imports no torch) a `HandlerEntry` that imports the class when it is used.
"""

from __future__ import annotations

from collections.abc import Callable, Iterable, Mapping
from dataclasses import dataclass, field
from typing import Any, TypeVar

from torchtitan.config import ConfigIssue, JobConfig
from torchtitan.config.registry import Registry, lazily, require_word, settings_of, validated
from torchtitan.config.run_context import RunContext
from torchtitan.config.schema import Section
from torchtitan.handlers import settings
from torchtitan.handlers.base import ModelHandler

H = TypeVar("H", bound=type)
Check = Callable[[RunContext, Any], Iterable[ConfigIssue]]
"""Yields the problems of a handler's settings."""


def no_problems(context: RunContext, settings: Any) -> Iterable[ConfigIssue]:
    """Find nothing."""
    return ()


@dataclass(frozen=True)
class HandlerEntry:
    """A handler: its settings model, and a function that imports and returns its class."""

    settings: type[Section]
    load: Callable[[], type[ModelHandler]]
    after: tuple[str, ...] = ()
    excludes: tuple[str, ...] = ()
    package: str = ""
    """A package that must be installed."""
    extra: str = ""
    """The extra of this library that installs it, if any."""
    check_static: Check = no_problems
    """Checks the settings against the rest of the config; imports no torch, reads no file."""
    check_environment: Check = no_problems
    """Checks the devices of this machine. May import torch."""
    dry_run_settings: Mapping[str, Any] = field(default_factory=dict)
    """Settings that a dry run uses instead, where the kernels need real numbers on real GPUs."""
    adds_adapters: bool = False
    """See `ModelHandler.adds_adapters`."""


def entry_of(name: str, thing: Any) -> HandlerEntry:
    """Return the entry of what is registered under `name`. Raises TypeError if it is no handler."""
    require_word(name)
    for rule in ("after", "excludes"):
        if isinstance(getattr(thing, rule, ()), str):  # its letters would be taken for names
            raise TypeError(f"{rule} of the handler {name} has to be a tuple of names")
    if isinstance(thing, HandlerEntry):
        return thing
    require_handler(name, thing)
    settings = settings_of(thing, f"the handler {name}")
    return HandlerEntry(
        settings,
        lambda: thing,
        tuple(thing.after),
        tuple(thing.excludes),
        adds_adapters=thing.adds_adapters,
    )


def require_handler(name: str, thing: Any) -> None:
    """Raise TypeError unless `thing` is a subclass of `ModelHandler`."""
    if not (isinstance(thing, type) and issubclass(thing, ModelHandler)):
        raise TypeError(
            f"the handler {name} is not a subclass of ModelHandler: inherit from"
            " torchtitan.handlers.base.ModelHandler, whose hooks do nothing by default"
        )


HANDLERS: Registry[HandlerEntry] = Registry("model.handlers", "torchtitan.handlers", entry_of)
LOW_PRECISION = ("float8", "mxfp8", "int8", "bitnet")
"""Handlers that make linears compute in another format: a model has one of them."""
TRAINING_ONLY = frozenset({"compile", "freeze", *LOW_PRECISION} - {"bitnet"})
"""Handlers that change how a model is trained, or how fast it is, but not what it computes."""


def _low_precision(name: str, path: str, settings: type[Section], **more: Any) -> HandlerEntry:
    excludes = tuple(other for other in LOW_PRECISION if other != name)
    load = lazily(f"torchtitan.handlers.{path}")
    return HandlerEntry(settings, load, (), excludes, package="torchao", extra="quant", **more)


for _name, _entry in {
    "compile": HandlerEntry(
        settings.CompileSettings,
        lazily("torchtitan.handlers.compile:CompileHandler"),
        after=LOW_PRECISION,
        dry_run_settings={"backend": "aot_eager"},
    ),
    "freeze": HandlerEntry(
        settings.FreezeSettings, lazily("torchtitan.handlers.freeze:FreezeHandler")
    ),
    "lora": HandlerEntry(
        settings.LoraSettings,
        lazily("torchtitan.handlers.lora:LoraHandler"),
        excludes=(*LOW_PRECISION, "qlora"),  # they swap plain linears only
        adds_adapters=True,
    ),
    "qlora": HandlerEntry(
        settings.QloraSettings,
        lazily("torchtitan.handlers.qlora:QloraHandler"),
        excludes=(*LOW_PRECISION, "lora"),
        adds_adapters=True,
    ),
    "flex_attention": HandlerEntry(
        settings.FlexAttentionSettings,
        lazily("torchtitan.handlers.flex_attention:FlexAttentionHandler"),
        check_static=settings.check_flex_attention,
        check_environment=settings.check_flex_attention_gpu,
    ),
    "float8": _low_precision(
        "float8",
        "float8:Float8Handler",
        settings.Float8Settings,
        check_static=settings.check_float8,
        check_environment=settings.check_float8_gpu,
    ),
    "mxfp8": _low_precision(
        "mxfp8",
        "mxfp8:Mxfp8Handler",
        settings.Mxfp8Settings,
        check_static=settings.check_mxfp8,
        check_environment=settings.check_mxfp8_gpu,
        dry_run_settings={"recipe_name": settings.EMULATED},
    ),
    "int8": _low_precision(
        "int8", "int8:Int8Handler", settings.Int8Settings, check_static=settings.check_int8
    ),
    "bitnet": _low_precision(
        "bitnet",
        "bitnet:BitNetHandler",
        settings.BitNetSettings,
        check_static=settings.check_bitnet,
    ),
}.items():
    HANDLERS.add_built_in(_name, _entry)


def register_handler(name: str) -> Callable[[H], H]:
    """Decorate a subclass of `ModelHandler` to make it available as `name`.

    Raises ValueError for a taken name, TypeError for a class that is not a handler.
    """
    return HANDLERS.decorator(name)


def handler_settings(config: JobConfig, name: str) -> Any:
    """Return the checked settings of `[handlers.NAME]`; the defaults without that table.

    Raises ConfigError naming each unknown or invalid setting.
    """
    settings = HANDLERS[name].settings
    return validated(settings, config.handlers.get(name, {}), f"handlers.{name}")


def changes_model(names: Iterable[str]) -> list[str]:
    """Return the handlers after which a model is no longer its family's, so no export knows it."""
    return sorted(set(names) - TRAINING_ONLY - {"flex_attention"})
