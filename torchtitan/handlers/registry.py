"""Handlers by name. No torch: a handler's code is imported when it is used, its settings before.

A third party adds one by the decorator `register_handler("name", Settings)` in a module listed in
`job.custom_import`, or by an entry point of the group `torchtitan.handlers` that gives a
`HandlerEntry`.
"""

from __future__ import annotations

from collections.abc import Callable
from dataclasses import dataclass
from functools import cache
from importlib import import_module
from importlib.metadata import entry_points
from typing import TypeVar

from pydantic import ValidationError

from torchtitan.config import ConfigError, JobConfig
from torchtitan.config.section import Section
from torchtitan.config.value_errors import problems_of_table
from torchtitan.handlers.compile_settings import CompileSettings
from torchtitan.handlers.protocol import ModelHandler

H = TypeVar("H", bound=type)


@dataclass(frozen=True)
class HandlerEntry:
    """A handler: its settings' model, and a function that imports and returns its class."""

    settings: type[Section]
    load: Callable[[], type[ModelHandler]]
    after: tuple[str, ...] = ()
    excludes: tuple[str, ...] = ()


def _lazy(path: str) -> Callable[[], type[ModelHandler]]:
    module, _, name = path.partition(":")
    return lambda: getattr(import_module(module), name)


_ENTRIES: dict[str, HandlerEntry] = {
    "compile": HandlerEntry(CompileSettings, _lazy("torchtitan.handlers.compile:CompileHandler")),
}


def register_handler(name: str, settings: type[Section]) -> Callable[[H], H]:
    """Class decorator: make a handler available as `name`, with its model of settings."""

    def register(handler: H) -> H:
        after, excludes = getattr(handler, "after", ()), getattr(handler, "excludes", ())
        _ENTRIES[name] = HandlerEntry(settings, lambda: handler, tuple(after), tuple(excludes))
        return handler

    return register


def handlers() -> dict[str, HandlerEntry]:
    """All handlers that are there, installed ones included."""
    return {**_installed(), **_ENTRIES}


def handler_settings(config: JobConfig, name: str) -> Section:
    """The settings in `[handlers.NAME]`, checked; defaults without that table.

    Raises ConfigError naming each setting that is unknown or unfit.
    """
    settings = handlers()[name].settings
    try:
        return settings.model_validate(config.handlers.get(name, {}))
    except ValidationError as error:
        raise ConfigError(problems_of_table(error, f"handlers.{name}", settings)) from None


@cache
def _installed() -> dict[str, HandlerEntry]:
    return {point.name: point.load() for point in entry_points(group="torchtitan.handlers")}
