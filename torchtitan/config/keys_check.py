"""Check the keys of a TOML file: unknown, misplaced, tables that are values, secrets.

Checked before the values, so that pydantic only ever sees keys it knows and a misspelt key is
answered with what was meant.
"""

import datetime
import math
from collections.abc import Iterator
from typing import Any

from torchtitan.config.compat.translate import is_old_section
from torchtitan.config.errors import ConfigIssue
from torchtitan.config.fields import known_keys, known_sections
from torchtitan.config.schema import MAX_INT64
from torchtitan.config.suggest import secret_problem, unknown_key, unknown_section
from torchtitan.utils.redaction import is_secret, names_a_secret


def split_known(table: dict[str, Any]) -> tuple[dict[str, Any], list[ConfigIssue]]:
    """Return the part of a TOML table that a config can hold, and the issues of the rest."""
    problems: list[ConfigIssue] = []
    return _split(table, "", problems), problems


def _split(table: dict[str, Any], prefix: str, problems: list[ConfigIssue]) -> dict[str, Any]:
    known: dict[str, Any] = {}
    for key, value in table.items():
        name = prefix + key
        if "." in key:
            problems.append(_quoted(key, prefix))
        elif name in known_sections():
            _take_table(name, value, known, problems)
        elif name in known_keys():
            problems.extend(secrets_in(name, value))
            known[key] = value
        elif isinstance(value, dict) and not prefix and not names_a_secret(name, value):
            problems.extend(_unknown_table(name, value))
        elif isinstance(value, dict) and key in known_sections():
            fix = f"write its keys without `{key}.`, below a line [{key}]"
            problems.append(ConfigIssue(name, f"names the section [{key}] inside a section", fix))
        elif not prefix and name not in {k.last_name for k in known_keys().values()}:
            problems.append(unknown_section(name))
        else:
            problems.append(unknown_key(name, name, value=value))
    return known


def _quoted(key: str, prefix: str) -> ConfigIssue:
    """Return the issue of a key with a dot inside quotes, which TOML takes for one name."""
    section, _, last = key.rpartition(".")
    known = prefix and key in known_keys()
    fix = f"write `{last}` in [{section}]" if known else f"did you mean unquoted `{key}`?"
    return ConfigIssue(f'"{key}"', "is one quoted key that contains a dot", fix)


def _take_table(name: str, value: Any, known: dict[str, Any], problems: list[ConfigIssue]) -> None:
    key = name.rpartition(".")[2]
    if not isinstance(value, dict):
        fix = f"write a table: [{name}], and its keys below it"
        problems.append(ConfigIssue(name, "is a section, not a value", fix, value))
    elif name in known_keys():  # free-form: its own users check the keys
        problems.extend(_free_problems(name, value))
        known[key] = value
    else:
        known[key] = _split(value, name + ".", problems)


def _unknown_table(name: str, table: dict[str, Any]) -> list[ConfigIssue]:
    """Return an issue for the table, or for each key if it is an older release's or a secret."""
    names = list(_keys_below(name, table))
    if not is_old_section(name):
        names = [f"{name}.{key}" for key, value in table.items() if names_a_secret(key, value)]
    return [unknown_key(key, key) for key in names] or [unknown_section(name)]


def _keys_below(prefix: str, table: dict[str, Any]) -> Iterator[str]:
    for key, value in table.items():
        name = f"{prefix}.{key}"
        if isinstance(value, dict) and value:
            yield from _keys_below(name, value)
        else:
            yield name


def _free_problems(prefix: str, table: dict[str, Any]) -> Iterator[ConfigIssue]:
    """Check what no free-form table may hold, whatever its keys mean."""
    for key, value in table.items():
        name = f"{prefix}.{key}"
        if prefix in ("handlers", "sinks") and not isinstance(value, dict):
            fix = f"write [{prefix}.{key}], and the {prefix[:-1]}'s settings below it"
            yield ConfigIssue(name, "needs a table", fix, value)
        elif names_a_secret(key, value):
            yield secret_problem(name)
        elif isinstance(value, dict):
            yield from _free_problems(name, value)
        else:
            yield from secrets_in(name, value)
            yield from value_problems(name, value)


def secrets_in(name: str, value: Any) -> Iterator[ConfigIssue]:
    """Yield an issue when a value, or anything in it, looks like a secret."""
    if is_secret("", value):
        yield secret_problem(name)


def value_problems(name: str, value: Any) -> Iterator[ConfigIssue]:
    """Yield an issue for each value that no setting can mean, in a table of unknown types."""
    for index, item in enumerate(value if isinstance(value, list) else [value]):
        place = f"{name}[{index}]" if isinstance(value, list) else name
        if isinstance(item, float) and not math.isfinite(item):
            yield ConfigIssue(place, "is not a finite number", "write a finite number", item)
        elif isinstance(item, int) and not -MAX_INT64 - 1 <= item <= MAX_INT64:
            yield ConfigIssue(place, "does not fit in 64 bits", "write a smaller number", item)
        elif isinstance(item, datetime.date | datetime.time):
            yield ConfigIssue(place, "is a date", "write it in quotes if text is meant", str(item))
