"""Load a config: defaults, then the TOML after the files it is based on, then the command line.

Everything wrong in the files and on the command line is reported at once. The values are validated
once, after merging, so a wrong value does not matter if a later source replaces it. Tables are
merged key by key; lists are replaced.
"""

from collections.abc import Mapping, Sequence
from dataclasses import dataclass, field, replace
from pathlib import Path
from typing import Any

from pydantic import ValidationError

from torchtitan.config.base_files import TomlFile, read_files
from torchtitan.config.cli_args import CommandLine, parse_command_line, read_settings
from torchtitan.config.compat import translate as compat
from torchtitan.config.compat.translate import is_old
from torchtitan.config.errors import ConfigError, ConfigIssue
from torchtitan.config.fields import UNSET, free_table_of, known_keys, known_sections
from torchtitan.config.fitting import with_document_mask
from torchtitan.config.keys_check import split_known, with_sections_once
from torchtitan.config.schema import JobConfig
from torchtitan.config.shipped import config_path
from torchtitan.config.value_errors import problems_of

_FILE = "job.config_file"
COMMAND_LINE = "command line"
DEFAULT = "default"
_NOTHING = ("", "none", "null", "unset")
"""Texts that people write where TOML has no null."""


@dataclass(frozen=True)
class LoadedConfig:
    """A config and the origin of each value.

    `origins`: by dotted key, "default", the name of a file or "command line".
    """

    config: JobConfig
    origins: dict[str, str]
    notices: tuple[str, ...] = ()
    """Notices of values that were read otherwise than written, one sentence each: an older
    release's keys, and flags that were given twice."""
    files: tuple[TomlFile, ...] = ()
    """The TOML, last, after the files that it is based on."""
    outdated: tuple[Path, ...] = ()
    """Those that are written in an older release's keys."""
    own: dict[str, Any] = field(default_factory=dict)
    """Values of the keys that the TOML sets itself, as a table of today's keys."""


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


@dataclass(frozen=True)
class _Source:
    """A file, or the command line: the values that it sets, as a table of today's keys."""

    origin: str
    values: dict[str, Any]
    old: compat.Translated
    prefix: str = ""
    """The start of its messages: the file, where there are several."""
    unset: tuple[str, ...] = ()

    def names(self) -> list[str]:
        """Return the dotted names of the keys that it sets."""
        return [*_leaves(self.values), *self.old.changed]

    def own_issue(self, issue: ConfigIssue) -> ConfigIssue:
        """Return an issue of one of its values under the name that the user wrote."""
        return replace(issue, key=self.prefix + self.old.names.get(issue.key, issue.key))


def _load(path: Path | None, command_line: CommandLine) -> LoadedConfig:
    files, issues = ([], []) if path is None else read_files(path)
    issues = [*command_line.problems, *issues]
    sources = [_of_file(file, index, len(files)) for index, file in enumerate(files)]
    flags = _of_flags(command_line)
    every = [*sources, flags]
    values, unused = _merge(every)
    compat.settle(values, [source.old for source in every])
    setter = {name: source for source in every for name in source.names()}
    config, value_problems = _validate(values, _leaves(flags.values))
    for source in every:
        issues += [replace(issue, key=source.prefix + issue.key) for issue in source.old.issues]
    issues += [_by_setter(problem, setter) for problem in value_problems]
    if config is None or issues:
        raise ConfigError(with_sections_once(issues))
    notices = [source.prefix + text for source in every for text in source.old.notices.values()]
    origins = {name: DEFAULT for name, key in known_keys().items() if key.kind != "table"}
    origins |= {name: setter[name].origin for name in _leaves(values)}
    return LoadedConfig(
        with_document_mask(config),
        origins,
        (*command_line.notices, *unused, *notices),
        tuple(files),
        tuple(file.path for file, one in zip(files, sources, strict=True) if one.old.notices),
        _own(sources[-1], values) if sources else {},
    )


def _of_file(file: TomlFile, index: int, count: int) -> _Source:
    """Return what one of `count` files sets, with the translation of older keys."""
    rest, old = compat.take_old(file.table)
    table, issues = split_known(rest)
    translated = compat.translate(old, _leaves(rest), overrides=index > 0)
    _, secrets = split_known(_nested(translated.values))
    translated.issues += [*issues, *secrets]
    values = _merged(table, _nested(translated.values))
    prefix = f"{file.path}: " if count > 1 else ""
    return _Source(str(file.path), values, translated, prefix, file.unset)


def _of_flags(command_line: CommandLine) -> _Source:
    given = command_line.values
    old = {name: value for name, value in given.items() if is_old(name, value)}
    today = {name: value for name, value in given.items() if name not in old}
    translated = compat.translate(old, today, "--", overrides=True)
    return _Source(COMMAND_LINE, _nested({**today, **translated.values}), translated)


def _merge(sources: Sequence[_Source]) -> tuple[dict[str, Any], list[str]]:
    """Return the values of all sources, where later ones win, and notices of useless `unset`s."""
    values: dict[str, Any] = {}
    notices = []
    for index, source in enumerate(sources):
        for name in source.unset:
            pending = [earlier.old.leave_out(name) for earlier in sources[:index]]
            if not _take_out(values, name) and not any(pending):
                notices.append(f"{source.prefix}{UNSET} has no use for {name}: no base sets it")
        values = _merged(values, source.values)
    return values, notices


def _merged(base: dict[str, Any], table: dict[str, Any]) -> dict[str, Any]:
    """Return a copy of `base` with the values of `table`, key by key."""
    merged = dict(base)
    for key, value in table.items():
        before = merged.get(key)
        if isinstance(value, dict):
            value = _merged(before if isinstance(before, dict) else {}, value)
        merged[key] = value
    return merged


def _take_out(table: dict[str, Any], name: str) -> bool:
    """Remove a dotted name, and return whether it was there."""
    for key, value in list(table.items()):  # a quoted key may have dots, too
        if key == name:
            del table[key]
            return True
        if isinstance(value, dict) and name.startswith(f"{key}."):
            return _take_out(value, name.removeprefix(f"{key}."))
    return False


def _own(file: _Source, values: dict[str, Any]) -> dict[str, Any]:
    """Return the merged values of the keys that `file` sets."""
    own = _common(values, file.values)
    for name in file.old.changed:
        section, _, key = name.rpartition(".")
        own.setdefault(section, {})[key] = values[section][key]
    return own


def _common(values: Mapping[str, Any], keys: Mapping[str, Any]) -> dict[str, Any]:
    common = {}
    for key in keys:
        if key in values:
            is_table = isinstance(keys[key], dict) and isinstance(values[key], dict)
            common[key] = _common(values[key], keys[key]) if is_table else values[key]
    return common


def _by_setter(problem: ConfigIssue, setter: Mapping[str, _Source]) -> ConfigIssue:
    """Return the issue of a value under the name that its source has for it."""
    source = setter.get(problem.key) or setter.get(problem.key.partition("[")[0])
    if source is None:
        return problem
    issue = source.own_issue(problem)
    if source.prefix and source.old.overrides and str(problem.value).lower() in _NOTHING:
        fix = f"{problem.fix}; what the base sets is left out by `{UNSET}` at the top of the file"
        return replace(issue, fix=fix)
    return issue


def _validate(
    values: dict[str, Any], flags: list[str]
) -> tuple[JobConfig | None, list[ConfigIssue]]:
    try:
        return JobConfig.model_validate(values), []
    except ValidationError as error:
        return None, problems_of(error, known_keys(), flags=flags)


def _nested(dotted: Mapping[str, Any]) -> dict[str, Any]:
    """Return dotted keys as tables. An empty table adds nothing to one that is there."""
    nested: dict[str, Any] = {}
    for name, value in dotted.items():
        *tables, last = name.split(".")
        table = nested
        for part in tables:
            inner = table.setdefault(part, {})
            if not isinstance(inner, dict):  # a value where the command line goes deeper
                inner = table[part] = {}
            table = inner
        if value != {} or not isinstance(table.get(last), dict):
            table[last] = value
    return nested


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
