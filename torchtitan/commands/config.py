"""`torchtitan config show | copy | convert | schema | docs`."""

import json
import sys
from collections.abc import Mapping

from pydantic import PydanticUserError

from torchtitan.commands import config_files
from torchtitan.config.errors import ConfigError, ConfigIssue
from torchtitan.config.load import load_config
from torchtitan.config.reference import reference_page
from torchtitan.config.schema import JobConfig, Section
from torchtitan.config.show import show_config
from torchtitan.config.suggest import did_you_mean

USAGE = """usage: torchtitan config show FILE [--section.key value ...]
           resolved values, each with its origin
       torchtitan config copy NAME FILE
           a shipped config (`torchtitan list configs`) as a file of your own
       torchtitan config convert OLD.toml [NEW.toml]
           a TOML of an older TorchTitan with today's keys, without its comments
       torchtitan config schema
           JSON schema of the TOML file, for editors
       torchtitan config docs
           the reference page, in Markdown"""


def run(argv: list[str]) -> int:
    """Print what the first argument names; exit status 0."""
    if not argv or "-h" in argv or "--help" in argv:
        print(USAGE)
        return 0
    word, *rest = argv
    if word not in _NUMBERS:
        fix = did_you_mean(word, _NUMBERS)
        raise ConfigError(ConfigIssue(f"config {word}", "is not a command", fix))
    numbers = _NUMBERS[word]
    if numbers and len(rest) not in numbers:
        usage = next(line for line in USAGE.splitlines() if f" config {word}" in line)
        fix = f"write `{usage[usage.index('torchtitan') :]}`"
        problem = "takes no arguments" if numbers == (0,) else "has not the arguments that it needs"
        raise ConfigError(ConfigIssue(f"config {word}", problem, fix, " ".join(rest)))
    if word == "show":
        loaded = load_config(rest)
        for notice in loaded.notices:
            print(f"notice: {notice}", file=sys.stderr)
        print(show_config(loaded))
    elif word == "copy":
        return config_files.copy(*rest)
    elif word == "convert":
        return config_files.convert(rest[0], rest[1] if len(rest) > 1 else None)
    elif word == "schema":
        print(json.dumps(json_schema(), indent=2))
    else:
        print(reference(), end="")
    return 0


_NUMBERS: dict[str, tuple[int, ...]] = {
    "show": (),
    "copy": (2,),
    "convert": (1, 2),
    "schema": (0,),
    "docs": (0,),
}
"""How many arguments a word takes; any for ()."""


def reference() -> str:
    """The text of docs/config.md."""
    from torchtitan.handlers.registry import HANDLERS
    from torchtitan.loss.registry import LOSSES
    from torchtitan.models.registry import families
    from torchtitan.optim.registry import OPTIMIZERS

    optimizers = _own({name: entry.settings for name, entry in OPTIMIZERS.entries().items()})
    return reference_page(
        {
            "model.args": _own({name: family.args_type for name, family in families().items()}),
            "handlers": _own({name: entry.settings for name, entry in HANDLERS.entries().items()}),
            "loss.args": _own({name: entry.settings for name, entry in LOSSES.entries().items()}),
            # What has no settings of its own needs no table.
            "optimizer.args": {name: s for name, s in optimizers.items() if s.model_fields},
            "lr_scheduler.args": {},  # the library's schedule has none
            "sinks": {},  # nor has it sinks that are named
        }
    )


def _own(models: Mapping[str, type[Section]]) -> dict[str, type[Section]]:
    """Without what installed packages of others add: the page is this library's."""
    return {
        name: model for name, model in models.items() if model.__module__.startswith("torchtitan.")
    }


def json_schema() -> dict[str, object]:
    """A JSON schema of the TOML file, as editors with TOML support read it."""
    schema = JobConfig.model_json_schema(mode="validation")
    for table, models in named_tables().items():
        settings = {}
        for name, model in models.items():
            settings[name], inner = _schema_of(model, f"{table}.{name}")
            schema["$defs"].update(inner)
        schema["properties"][table]["properties"] = settings
    return {
        "$schema": "https://json-schema.org/draft/2020-12/schema",
        **schema,
        "title": "torchtitan run",
    }


def _schema_of(model: type[Section], prefix: str) -> tuple[dict[str, object], dict[str, object]]:
    """The schema of a table, and what it refers to by names that begin with `prefix`: others'
    settings may have classes of the same name."""
    template = f"#/$defs/{prefix}.{{model}}"
    try:
        schema = model.model_json_schema(mode="validation", ref_template=template)
    except PydanticUserError:
        return {"type": "object"}, {}  # somebody's own, of a type that JSON has no word for
    inner = {f"{prefix}.{name}": value for name, value in schema.pop("$defs", {}).items()}
    return schema, inner


def named_tables() -> dict[str, dict[str, type[Section]]]:
    """What `[handlers.NAME]` and `[sinks.NAME]` may hold, by name, of all that is there."""
    from torchtitan.handlers.registry import HANDLERS
    from torchtitan.metrics.sink_registry import SINKS

    return {
        "handlers": {name: entry.settings for name, entry in HANDLERS.entries().items()},
        "sinks": {name: entry.settings for name, entry in SINKS.entries().items()},
    }
