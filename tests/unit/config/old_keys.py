"""What the tests of older keys share: the releases' keys with their defaults, and small readers."""

import csv
import json
from pathlib import Path
from typing import Any

import pytest
import tomli_w

from torchtitan.config.errors import ConfigError, ConfigIssue
from torchtitan.config.load import LoadedConfig

TOMLS = Path(__file__).parents[2] / "assets" / "torchtitan_tomls"


def columns() -> dict[str, dict[str, Any]]:
    """Every key of every release with its default."""
    with (TOMLS / "keys.csv").open(encoding="utf-8") as file:
        rows = list(csv.DictReader(file, delimiter=";", quoting=csv.QUOTE_NONE))
    releases = [name for name in rows[0] if name != "key"]
    return {
        release: {row["key"]: json.loads(row[release]) for row in rows if row[release]}
        for release in releases
    }


COLUMNS = columns()
EVERY_KEY = sorted({name for column in COLUMNS.values() for name in column})


def write(folder: Path, keys: dict[str, Any]) -> Path:
    table: dict[str, Any] = {}
    for name, value in keys.items():
        *sections, last = name.split(".")
        inner = table
        for section in sections:
            inner = inner.setdefault(section, {})
        inner[last] = value
    path = folder / "run.toml"
    path.write_text(tomli_w.dumps(table))
    return path


def problems_of(call) -> list[ConfigIssue]:
    with pytest.raises(ConfigError) as caught:
        call()
    return caught.value.problems


def problem_of(call) -> str:
    (problem,) = problems_of(call)
    return str(problem)


def value_of(loaded: LoadedConfig, name: str) -> Any:
    value: Any = loaded.config
    for part in name.split("."):
        value = value[part] if isinstance(value, dict) else getattr(value, part)
    return value
