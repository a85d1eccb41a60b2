"""Loading a config: defaults, then the TOML file, then the command line.

Everything wrong in the file and on the command line is reported at once. The values are validated
once, after merging, so a wrong value in the file does not matter if the command line replaces it.
"""

from collections.abc import Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Any

from pydantic import ValidationError

from torchtitan.config.cli_args import parse_command_line
from torchtitan.config.errors import ConfigError, Problem
from torchtitan.config.fields import free_table_of, known_keys, known_sections
from torchtitan.config.job_config import JobConfig
from torchtitan.config.keys_check import split_known
from torchtitan.config.toml_file import read_toml
from torchtitan.config.value_errors import problems_of

COMMAND_LINE = "command line"
DEFAULT = "default"


@dataclass(frozen=True)
class LoadedConfig:
    """A config and, for every dotted key, where its value came from: "default", the file's name or
    "command line"."""

    config: JobConfig
    origins: dict[str, str]


def load_config(argv: Sequence[str]) -> LoadedConfig:
    """The config that a command line describes; raises `ConfigError` with every problem found."""
    command_line = parse_command_line(argv)
    problems = list(command_line.problems)
    file_name = command_line.values.get("job.config_file")
    file_values: dict[str, Any] = {}
    if file_name is not None:
        try:
            file_values, key_problems = split_known(read_toml(Path(str(file_name))))
            problems += key_problems
        except ConfigError as error:
            problems += error.problems
    values = _merge(file_values, command_line.values)
    config, value_problems = _validate(values, list(command_line.values))
    problems += value_problems
    if config is None or problems:
        raise ConfigError(problems)
    origins = {name: DEFAULT for name, key in known_keys().items() if key.kind != "table"}
    origins |= dict.fromkeys(_leaves(file_values), str(file_name))
    origins |= dict.fromkeys(_leaves(_merge({}, command_line.values)), COMMAND_LINE)
    return LoadedConfig(config, origins)


def load_toml(path: Path) -> JobConfig:
    """The config in one file, such as a run folder's `config.toml`, exactly as it was written."""
    values, problems = split_known(read_toml(path))
    config, value_problems = _validate(values, [])
    problems += value_problems
    if config is None or problems:
        raise ConfigError(problems)
    return config


def _validate(values: dict[str, Any], flags: list[str]) -> tuple[JobConfig | None, list[Problem]]:
    try:
        return JobConfig.model_validate(values), []
    except ValidationError as error:
        return None, problems_of(error, flags)


def _merge(base: dict[str, Any], dotted: dict[str, Any]) -> dict[str, Any]:
    """`base` with the dotted keys set in it; `base` stays as it is."""
    merged = _copied(base)
    for name, value in dotted.items():
        *tables, last = name.split(".")
        table = merged
        for part in tables:
            inner = table.setdefault(part, {})
            if not isinstance(inner, dict):  # a value where the command line goes deeper
                inner = table[part] = {}
            table = inner
        table[last] = value
    return merged


def _copied(table: dict[str, Any]) -> dict[str, Any]:
    return {k: _copied(v) if isinstance(v, dict) else v for k, v in table.items()}


def _leaves(table: dict[str, Any], prefix: str = "") -> list[str]:
    names = []
    for key, value in table.items():
        name = prefix + key
        nested = name in known_sections() or free_table_of(name)
        if isinstance(value, dict) and nested:
            names += _leaves(value, name + ".")
        else:
            names.append(name)
    return names
