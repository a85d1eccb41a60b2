"""`torchtitan config show | schema | docs`."""

import json
from collections.abc import Mapping

from torchtitan.config.errors import ConfigError, Problem
from torchtitan.config.job_config import JobConfig
from torchtitan.config.load import load_config
from torchtitan.config.reference import reference_page
from torchtitan.config.section import Section
from torchtitan.config.show import show_config
from torchtitan.config.suggest import did_you_mean

USAGE = """usage: torchtitan config show FILE [--section.key value ...]
           resolved values, each with its origin
       torchtitan config schema
           JSON schema of the TOML file, for editors
       torchtitan config docs
           the reference page, in Markdown"""


def run(argv: list[str]) -> int:
    """Print what the first argument names; exit status 0."""
    if not argv or argv[0] in ("-h", "--help"):
        print(USAGE)
        return 0
    word, *rest = argv
    if word == "show":
        print(show_config(load_config(rest)))
    elif word in ("schema", "docs") and rest:
        raise ConfigError(Problem(f"config {word}", "takes no arguments", "remove them", rest[0]))
    elif word == "schema":
        print(json.dumps(json_schema(), indent=2))
    elif word == "docs":
        print(reference(), end="")
    else:
        fix = did_you_mean(word, ("show", "schema", "docs"))
        raise ConfigError(Problem(f"config {word}", "is not a command", fix))
    return 0


def reference() -> str:
    """The text of docs/config.md."""
    from torchtitan.handlers.registry import handlers
    from torchtitan.models.registry import families

    args = {name: family.args_type for name, family in families().items()}
    settings = {name: entry.settings for name, entry in handlers().items()}
    return reference_page(_own(args), _own(settings))


def _own(models: Mapping[str, type[Section]]) -> dict[str, type[Section]]:
    """Without what installed packages of others add: the page is this library's."""
    return {
        name: model for name, model in models.items() if model.__module__.startswith("torchtitan.")
    }


def json_schema() -> dict[str, object]:
    """A JSON schema of the TOML file, as editors with TOML support read it."""
    return {
        "$schema": "https://json-schema.org/draft/2020-12/schema",
        **JobConfig.model_json_schema(mode="validation"),
        "title": "torchtitan run",
    }
