"""Handlers by name. No torch: a handler's code is imported when it is used, its settings before.

A third party adds one by the decorator `register_handler` in a module that `job.custom_import`
names, or by an entry point of the group `torchtitan.handlers`, which gives the class, or (so that
checking a config imports no torch) a `HandlerEntry` that imports the class when it is used.
"""

from __future__ import annotations

from collections.abc import Callable, Mapping
from dataclasses import dataclass, field
from typing import Any, TypeVar

from torchtitan.config import JobConfig
from torchtitan.config.registry import Registry, lazily, require_word
from torchtitan.config.schema import Section
from torchtitan.config.value_errors import validated
from torchtitan.handlers import (
    bitnet_settings,
    flex_attention_settings,
    float8_settings,
    int8_settings,
    mxfp8_settings,
)
from torchtitan.handlers.compile_settings import CompileSettings
from torchtitan.handlers.freeze_settings import FreezeSettings
from torchtitan.handlers.protocol import Check, ModelHandler, no_problems

H = TypeVar("H", bound=type)
_REQUIRED = ("convert", "pre_optimizer_hook", "post_optimizer_hook")


@dataclass(frozen=True)
class HandlerEntry:
    """A handler: its settings' model, and a function that imports and returns its class."""

    settings: type[Section]
    load: Callable[[], type[ModelHandler]]
    after: tuple[str, ...] = ()
    excludes: tuple[str, ...] = ()
    package: str = ""
    """What has to be installed beside this library."""
    extra: str = ""
    """The extra of this library that installs it, if one does."""
    check: Check = no_problems
    """Of the settings with the rest of the config; without torch, and reads no file."""
    probe: Check = no_problems
    """Of this machine's devices. May import torch."""
    dry_run_settings: Mapping[str, Any] = field(default_factory=dict)
    """Settings that a dry run uses instead: the kernels need real numbers on real GPUs."""


def entry_of(name: str, thing: Any) -> HandlerEntry:
    """What is registered under `name`, if it is one. Raises TypeError."""
    require_word(name)
    for rule in ("after", "excludes"):
        if isinstance(getattr(thing, rule, ()), str):  # its letters would be taken for names
            raise TypeError(f"{rule} of the handler {name} has to be a tuple of names")
    if isinstance(thing, HandlerEntry):
        return thing
    if not isinstance(thing, type):
        raise TypeError(f"the handler {name} is neither a class nor a HandlerEntry")
    missing = [method for method in _REQUIRED if not callable(getattr(thing, method, None))]
    if missing:
        raise TypeError(f"the handler {name} lacks {', '.join(missing)}")
    settings = getattr(thing, "Settings", Section)
    if not (isinstance(settings, type) and issubclass(settings, Section)):
        raise TypeError(f"Settings of the handler {name} is not a Section")
    after, excludes = getattr(thing, "after", ()), getattr(thing, "excludes", ())
    return HandlerEntry(settings, lambda: thing, tuple(after), tuple(excludes))


HANDLERS: Registry[HandlerEntry] = Registry("model.handlers", "torchtitan.handlers", entry_of)
LOW_PRECISION = ("float8", "mxfp8", "int8", "bitnet")
"""Each makes linears compute in another format: a model has one of them."""
HANDLERS.add_built_in(
    "compile",
    HandlerEntry(
        CompileSettings,
        lazily("torchtitan.handlers.compile:CompileHandler"),
        after=LOW_PRECISION,
        dry_run_settings={"backend": "aot_eager"},
    ),
)
HANDLERS.add_built_in(
    "freeze", HandlerEntry(FreezeSettings, lazily("torchtitan.handlers.freeze:FreezeHandler"))
)
HANDLERS.add_built_in(
    flex_attention_settings.NAME,
    HandlerEntry(
        flex_attention_settings.Settings,
        lazily("torchtitan.handlers.flex_attention:FlexAttentionHandler"),
        check=flex_attention_settings.check,
        probe=flex_attention_settings.probe,
    ),
)


def _add_low_precision(name: str, path: str, module: Any, **dry_run_settings: Any) -> None:
    HANDLERS.add_built_in(
        name,
        HandlerEntry(
            module.Settings,
            lazily(path),
            excludes=tuple(other for other in LOW_PRECISION if other != name),
            package="torchao",
            extra="quant",
            check=module.check,
            probe=module.probe,
            dry_run_settings=dry_run_settings,
        ),
    )


_add_low_precision("float8", "torchtitan.handlers.float8:Float8Handler", float8_settings)
_add_low_precision(
    "mxfp8",
    "torchtitan.handlers.mxfp8:Mxfp8Handler",
    mxfp8_settings,
    recipe_name=mxfp8_settings.EMULATED,
)
_add_low_precision("int8", "torchtitan.handlers.int8:Int8Handler", int8_settings)
_add_low_precision("bitnet", "torchtitan.handlers.bitnet:BitNetHandler", bitnet_settings)


def register_handler(name: str) -> Callable[[H], H]:
    """Class decorator: make a handler available as `name`. Its settings are its `Settings`.

    Raises ValueError for a taken name, TypeError for a class that is no handler.
    """
    return HANDLERS.decorator(name)


def handler_settings(config: JobConfig, name: str) -> Any:
    """The settings in `[handlers.NAME]`, checked; defaults without that table.

    Raises ConfigError naming each setting that is unknown or unfit.
    """
    settings = HANDLERS[name].settings
    return validated(settings, config.handlers.get(name, {}), f"handlers.{name}")
