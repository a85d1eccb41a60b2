"""Load a config: defaults, then the TOML file, then the command line.

Everything wrong in the file and on the command line is reported at once. The values are validated
once, after merging, so a wrong value in the file does not matter if the command line replaces it.
"""

from collections.abc import Mapping, Sequence
from dataclasses import dataclass, field, replace
from pathlib import Path
from typing import Any

from pydantic import ValidationError

from torchtitan.config.cli_args import CommandLine, parse_command_line, read_settings
from torchtitan.config.compat import translate as compat
from torchtitan.config.compat.translate import is_old
from torchtitan.config.errors import ConfigError, ConfigIssue
from torchtitan.config.fields import free_table_of, known_keys, known_sections
from torchtitan.config.fitting import with_document_mask
from torchtitan.config.keys_check import split_known
from torchtitan.config.schema import JobConfig
from torchtitan.config.shipped import config_path
from torchtitan.config.toml_file import read_toml
from torchtitan.config.value_errors import problems_of

_FILE = "job.config_file"
COMMAND_LINE = "command line"
DEFAULT = "default"


@dataclass(frozen=True)
class LoadedConfig:
    """A config and the origin of each value.

    `origins`: by dotted key, "default", the file's name or "command line".
    """

    config: JobConfig
    origins: dict[str, str]
    notices: tuple[str, ...] = ()
    """Notices of values that were read otherwise than written, one sentence each: an older
    release's keys, and flags that were given twice."""
    given: dict[str, Any] = field(default_factory=dict)
    """Values that file and command line set, as a table of today's keys."""


def load_config(argv: Sequence[str]) -> LoadedConfig:
    """Return the config of a command line.

    Raises:
        ConfigError: with every issue found.
    """
    command_line = parse_command_line(argv)
    file_name = command_line.values.get("job.config_file")
    path = None if file_name is None else config_path(str(file_name))
    if path is not None and str(path) != file_name:
        command_line.values["job.config_file"] = str(path)
    return _load(path, command_line)


def load_over(
    base: JobConfig | str | None, settings: Mapping[str, Any] | Sequence[str] = ()
) -> LoadedConfig:
    """Return a config, or that of a file or a shipped name, with settings over it.

    `settings` are values by dotted key, or words of a command line. Raises ConfigError.
    """
    if isinstance(settings, Mapping):
        over = read_settings(settings)
    else:
        over = parse_command_line(settings)
    if _FILE in over.values:
        fix = "write load_config(FILE, settings)"
        over.problems.append(ConfigIssue(_FILE, "is named among the settings", fix))
    under, path = CommandLine(), None
    if isinstance(base, JobConfig):
        under = read_settings(base.model_dump(exclude_unset=True, warnings=False))
    elif base is not None:
        path = config_path(base)
        under.values[_FILE] = str(path)
    over.values = {**under.values, **over.values}
    loaded = _load(path, over)
    origins = {k: "Python" if o == COMMAND_LINE else o for k, o in loaded.origins.items()}
    return replace(loaded, origins=origins)


def load_toml(path: Path) -> JobConfig:
    """Return the config in one file, such as a run folder's `config.toml`, exactly as written."""
    return _load(path, CommandLine()).config


def _load(path: Path | None, command_line: CommandLine) -> LoadedConfig:
    issues = list(command_line.problems)
    table: dict[str, Any] = {}
    file = compat.Translated()
    if path is not None:
        try:
            table, file = _read(path)
        except ConfigError as error:
            issues += error.problems
    old = {name: value for name, value in command_line.values.items() if is_old(name, value)}
    today = {name: value for name, value in command_line.values.items() if name not in old}
    flags = compat.translate(old, today, "--")
    flag_values = {**today, **flags.values}

    values = _merge(table, flag_values)
    compat.settle(values, file, flags, today)
    config, value_problems = _validate(values, list(flag_values))
    written = {**{k: v for k, v in file.names.items() if k not in flag_values}, **flags.names}
    issues += [*file.issues, *flags.issues]
    issues += [_by_written_name(problem, written) for problem in value_problems]
    if config is None or issues:
        raise ConfigError(issues)
    from_file = dict.fromkeys(_leaves(values), str(path))
    from_flags = dict.fromkeys([*_leaves(_merge({}, flag_values)), *flags.changed], COMMAND_LINE)
    notices = (*command_line.notices, *file.notices.values(), *flags.notices.values())
    origins = {name: DEFAULT for name, key in known_keys().items() if key.kind != "table"}
    origins |= from_file
    origins |= {name: origin for name, origin in from_flags.items() if name in from_file}
    return LoadedConfig(with_document_mask(config), origins, notices, values)


def _read(path: Path) -> tuple[dict[str, Any], compat.Translated]:
    """Return a file's values by today's keys, and the translation of older ones."""
    rest, old = compat.take_old(read_toml(path))
    table, issues = split_known(rest)
    file = compat.translate(old, _leaves(rest))
    _, secrets = split_known(_merge({}, file.values))
    file.issues += [*issues, *secrets]
    return _merge(table, file.values), file


def _by_written_name(problem: ConfigIssue, written: dict[str, str]) -> ConfigIssue:
    """Return the issue under the name that the user wrote."""
    return replace(problem, key=written.get(problem.key, problem.key))


def _validate(
    values: dict[str, Any], flags: list[str]
) -> tuple[JobConfig | None, list[ConfigIssue]]:
    try:
        return JobConfig.model_validate(values), []
    except ValidationError as error:
        return None, problems_of(error, known_keys(), flags=flags)


def _merge(base: dict[str, Any], dotted: dict[str, Any]) -> dict[str, Any]:
    """Return a copy of `base` with the dotted keys set in it.

    An empty table adds nothing to one that is there.
    """
    merged = _copied(base)
    for name, value in dotted.items():
        *tables, last = name.split(".")
        table = merged
        for part in tables:
            inner = table.setdefault(part, {})
            if not isinstance(inner, dict):  # a value where the command line goes deeper
                inner = table[part] = {}
            table = inner
        if value != {} or not isinstance(table.get(last), dict):
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
