"""`torchtitan config diff`: the settings in which two configs differ. No torch."""

import re
import sys
from dataclasses import dataclass, replace
from pathlib import Path
from typing import Any

from torchtitan.checkpoint.config_diff import RESOLVED, compare, flatten, reason_to_differ
from torchtitan.checkpoint.stored_run import CONFIG_NAME
from torchtitan.config.errors import ConfigError, ConfigIssue
from torchtitan.config.fields import known_keys, known_sections
from torchtitan.config.load import load_config
from torchtitan.config.paths import expand_path
from torchtitan.config.schema import JobConfig
from torchtitan.config.shipped import shipped_configs
from torchtitan.config.toml_text import toml_value
from torchtitan.utils.text import plural

_FILE = "job.config_file"
"""Names the file itself, so it always differs."""
_UNSET = object()


@dataclass(frozen=True)
class Difference:
    """A setting that two configs have with other values; an unset one is None."""

    key: str
    before: Any
    after: Any
    another_run: bool
    """A resume with the second config of a run that has the first one is refused for it."""

    def __str__(self) -> str:
        last = self.key.removeprefix(f"{section_of(self.key)}.")
        text = f"{last}: {toml_value(self.before)} -> {toml_value(self.after)}"
        if self.another_run:
            return text
        reason = reason_to_differ(_without_index(self.key))
        if _is_open(self.key, self.before, self.after):
            reason = "the run sets what is left open"
        return f"{text}  (may change{f': {reason}' if reason else ''})"


def print_difference(first: str, second: str) -> None:
    """Print the settings of two configs, run folders or names that differ. Raises ConfigError."""
    configs, issues = [], []
    for name in (first, second):
        try:
            configs.append(_config_of(name))
        except ConfigError as error:
            issues += error.problems
    if issues:
        raise ConfigError(issues)
    found = differences(*configs)
    print(f"{first} -> {second}")
    sections = list(known_sections())
    groups = dict.fromkeys(section_of(each.key) for each in found)
    for name in sorted(groups, key=lambda name: sections.index(_known_section(name))):
        print(f"\n[{name}]")
        for each in found:
            if section_of(each.key) == name:
                print(f"  {each}")
    print("\n" + _summary(found) if found else "no setting differs")


def differences(first: JobConfig, second: JobConfig) -> list[Difference]:
    """Return the settings in which two configs differ, without the name of the file."""
    one, other = flatten(first.model_dump()), flatten(second.model_dump())
    _align_tables(one, other)
    refused = {issue.key for issue in compare(first.model_dump(), second)[0]}
    found = []
    for key in dict.fromkeys([*one, *other]):
        if key != _FILE and one.get(key, _UNSET) != other.get(key, _UNSET):
            pair = one.get(key), other.get(key)
            another = _is_refused(key, refused) and not _is_open(key, *pair)
            found.append(Difference(key, *pair, another))
    return found


def section_of(key: str) -> str:
    """Return the table that a key is written in: `handlers.lora` of `handlers.lora.rank`."""
    section = _known_section(key)
    named = section in ("handlers", "sinks")
    return ".".join(key.split(".")[:2]) if named else section


def _known_section(key: str) -> str:
    return max((name for name in known_sections() if f"{key}.".startswith(f"{name}.")), key=len)


def _config_of(text: str) -> JobConfig:
    """Return the config that the user names; issues and notices begin with the name."""
    path = Path(expand_path(text))
    is_name = text in shipped_configs() and not (path / CONFIG_NAME).exists()
    if path.is_dir() and not is_name:
        path /= CONFIG_NAME
        # A crash of the machine can leave an empty file, which would be a config of defaults.
        if not path.exists() or not path.stat().st_size:
            fix = "name a run folder, a TOML or a config of the library"
            raise ConfigError(ConfigIssue(text, f"is a folder without a {CONFIG_NAME}", fix))
        text = str(path)
    try:
        loaded = load_config([f"--{_FILE}={text}"])
    except ConfigError as error:
        raise ConfigError([_of_file(issue, text) for issue in error.problems]) from None
    for notice in loaded.notices:
        print(f"notice: {text}: {notice}", file=sys.stderr)
    return loaded.config


def _of_file(issue: ConfigIssue, file: str) -> ConfigIssue:
    """Return an issue that names its file, as only those of a single file do not."""
    is_named = issue.key.startswith((file, str(Path(file).absolute())))
    return issue if is_named else replace(issue, key=f"{file}: {issue.key}")


def _align_tables(one: dict[str, Any], other: dict[str, Any]) -> None:
    """Replace lists of tables by their tables, and those that both have by their keys."""
    for name, key in known_keys().items():
        if key.kind == "tables":
            lists = [side.pop(name, []) for side in (one, other)]
            shared = min(map(len, lists))
            for side, tables in zip((one, other), lists, strict=True):
                for index, table in enumerate(tables):
                    place = f"{name}[{index}]"
                    side |= flatten(table, f"{place}.") if index < shared else {place: table}


def _is_refused(key: str, refused: set[str]) -> bool:
    plain, whole = _without_index(key), key.partition("[")[0]
    return plain in refused or (whole in refused and reason_to_differ(plain) is None)


def _is_open(key: str, before: Any, after: Any) -> bool:
    return key in RESOLVED and bool({before, after} & {None, -1})


def _without_index(key: str) -> str:
    return re.sub(r"\[\d+\]", "", key)


def _summary(found: list[Difference]) -> str:
    another = sum(each.another_run for each in found)
    rest = len(found) - another
    parts = [f"{another} for another run"] if another else []
    parts += [f"{rest} that may change when a run resumes"] if rest else []
    differ = f"{plural(len(found), 'setting')} differ{'s' if len(found) == 1 else ''}"
    return f"{differ}: {', '.join(parts)}"
