"""Sinks of metrics by name, beside those that have a switch. No torch.

A third party adds one by the decorator `register_sink`, in a module that `job.custom_import` names,
or by an entry point of the group `torchtitan.sinks`. Either gives a class that is made by
`(settings, run)`, a `SinkRun`, and is a `Sink` (`torchtitan/metrics/sinks.py`); `Settings`, a
`Section`, says what `[sinks.NAME]` may hold. It is opened on the ranks that write. Whatever it
raises is reported once, and stops no run.
"""

from collections.abc import Callable, Mapping
from dataclasses import dataclass
from pathlib import Path
from typing import Any, TypeVar

from torchtitan.config.registry import Registry, require_word
from torchtitan.config.schema import JobConfig, Section
from torchtitan.config.value_errors import validated
from torchtitan.metrics.sinks import Sink

C = TypeVar("C", bound=type)
_REQUIRED = ("resume", "write", "flush", "close")


@dataclass(frozen=True)
class SinkRun:
    """The run that a sink is opened for."""

    folder: Path
    """The run folder."""
    run_id: str
    """The same after a resume."""
    config: Mapping[str, Any]
    """All settings, by section."""
    rank: int | None
    """None unless every rank writes."""


@dataclass(frozen=True)
class SinkEntry:
    """A sink: its settings' model, and a function that imports and returns what opens it."""

    settings: type[Section]
    load: Callable[[], Callable[[Any, SinkRun], Sink]]


def entry_of(name: str, thing: Any) -> SinkEntry:
    """What is registered under `name`, if it is one. Raises TypeError."""
    require_word(name)
    if isinstance(thing, SinkEntry):
        return thing
    if not isinstance(thing, type):
        raise TypeError(f"the sink {name} is neither a class nor a SinkEntry")
    missing = [method for method in _REQUIRED if not callable(getattr(thing, method, None))]
    missing += [key for key in ("name", "keeps_trying") if not hasattr(thing, key)]
    if missing:
        raise TypeError(f"the sink {name} lacks {', '.join(missing)}")
    settings = getattr(thing, "Settings", Section)
    if not (isinstance(settings, type) and issubclass(settings, Section)):
        raise TypeError(f"Settings of the sink {name} is not a Section")
    return SinkEntry(settings, lambda: thing)


SINKS: Registry[SinkEntry] = Registry("metrics.sinks", "torchtitan.sinks", entry_of)


def register_sink(name: str) -> Callable[[C], C]:
    """Class decorator: make a sink available as `name`. Its settings are its `Settings`.

    Raises ValueError for a taken name, TypeError for a class that is no sink.
    """
    return SINKS.decorator(name)


def sink_settings(config: JobConfig, name: str) -> Any:
    """The settings in `[sinks.NAME]`, checked; defaults without that table.

    Raises ConfigError naming each setting that is unknown or unfit.
    """
    settings = SINKS[name].settings
    return validated(settings, config.sinks.get(name, {}), f"sinks.{name}")


def sink_opener(config: JobConfig, name: str, run: SinkRun) -> Callable[[], Sink]:
    """What opens the sink; imports its code only then."""
    return lambda: SINKS[name].load()(sink_settings(config, name), run)
