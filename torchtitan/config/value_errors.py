"""pydantic's errors in the words of whoever wrote the TOML."""

import datetime
import re
from collections.abc import Mapping, Sequence
from typing import Any

from pydantic import ValidationError
from pydantic_core import ErrorDetails

from torchtitan.config.errors import ConfigError, ConfigIssue
from torchtitan.config.fields import Key, example_table, keys_of, known_keys
from torchtitan.config.schema import MAX_INT64, Section
from torchtitan.config.suggest import did_you_mean, nearest

_NEEDS = {
    "int_type": "an integer",
    "float_type": "a number",
    "bool_type": "true or false",
    "string_type": "text",
    "tuple_type": "a list",
    "list_type": "a list",
    "dict_type": "a table",
    "model_type": "a table",
}
_RELATIONS = {
    "greater_than": ("gt", "more than"),
    "greater_than_equal": ("ge", "at least"),
    "less_than": ("lt", "less than"),
    "less_than_equal": ("le", "at most"),
}


def problems_of(error: ValidationError, flags: Sequence[str] = ()) -> list[ConfigIssue]:
    """One problem per error of a config. `flags` are the keys that came from the command line,
    where every value is text and there are no quotes to take away."""
    return _problems(error, "", known_keys(), frozenset(flags))


def problems_of_table(
    error: ValidationError, table: str, settings: type[Section]
) -> list[ConfigIssue]:
    """One problem per error of a free-form table, such as `model.args`, by its own `settings`."""
    try:
        keys = {key.name: key for key in keys_of(settings)}
    except (AssertionError, ValueError):  # somebody's types that are no plain TOML: no examples
        keys = {}
    return _problems(error, table + ".", keys, frozenset())


def validated(settings: type[Section], values: Any, table: str) -> Any:
    """A `settings` of a free-form table's values. Raises ConfigError naming each key of `table`
    that is unknown or unfit."""
    try:
        return settings.model_validate(values)
    except ValidationError as error:
        raise ConfigError(problems_of_table(error, table, settings)) from None


def _problems(
    error: ValidationError, prefix: str, keys: Mapping[str, Key], flags: frozenset[str]
) -> list[ConfigIssue]:
    found = []
    for detail in error.errors(include_url=False):
        name = _dotted(detail["loc"])
        found.append(_problem(prefix + name, keys.get(name), keys, detail, name in flags))
    return found


def _problem(
    name: str, key: Key | None, keys: Mapping[str, Key], detail: ErrorDetails, is_flag: bool
) -> ConfigIssue:
    value = detail["input"]
    kind = detail["type"]
    if kind in _NEEDS:
        return _wrong_type(name, key, value, kind, is_flag)
    if kind in _RELATIONS:
        return _out_of_range(name, key, value, detail)
    if kind == "finite_number":
        return ConfigIssue(name, "is not a finite number", _range_fix(key), value)
    if kind == "literal_error":
        return _not_a_choice(name, key, detail, value)
    if kind == "missing":
        last = name.rpartition(".")[2]
        return ConfigIssue(name, "is missing", f"add `{last} = ...`")
    if kind == "extra_forbidden":
        return _unknown(name, detail, keys)
    if kind == "value_error":
        problem, _, fix = str(detail["ctx"]["error"]).partition(". Fix: ")
        return ConfigIssue(name, problem, fix or "correct the value", value)
    return ConfigIssue(name, detail["msg"], _example(key), value)


def _wrong_type(name: str, key: Key | None, value: Any, kind: str, is_flag: bool) -> ConfigIssue:
    needed = _NEEDS[kind]
    fix = _example(key)
    if is_flag:
        number = _whole_number(value) if kind == "int_type" else None
        fix = fix if number is None else f"write {number}"
        return ConfigIssue(name, f"needs {needed}", fix, value)
    if kind == "int_type" and isinstance(value, float) and value.is_integer():
        fix = f"write {int(value)}"
    elif kind in ("int_type", "float_type", "bool_type") and isinstance(value, str):
        fix = _without_quotes(value, kind) or fix
    elif kind in ("tuple_type", "list_type") and isinstance(value, str):
        fix = _example(key) if key and key.kind == "lists" else f'write ["{value}"]'
    elif kind == "string_type" and not isinstance(value, list | dict):
        fix = f'write "{value}"'
    shown = str(value) if isinstance(value, datetime.date | datetime.time | dict) else value
    return ConfigIssue(name, f"needs {needed}, and this is {_describe(value)}", fix, shown)


def _without_quotes(value: str, kind: str) -> str | None:
    text = value.strip()
    if kind == "bool_type":
        word = text.lower()
        return f"write {word}, without quotes" if word in ("true", "false") else None
    if kind == "int_type":
        number = _whole_number(text)
        return None if number is None else f"write {number}, without quotes"
    try:
        float(text)
    except ValueError:
        return None
    return f"write {text}, without quotes"


def _whole_number(text: Any) -> int | None:
    """The integer that `8.0` or `1e3` stands for."""
    try:
        number = float(text)
    except (TypeError, ValueError):
        return None
    return int(number) if number.is_integer() and abs(number) <= MAX_INT64 else None


def _describe(value: Any) -> str:
    if isinstance(value, bool):
        return "a boolean"
    if isinstance(value, datetime.date | datetime.time):
        return "a date"
    names = {int: "an integer", float: "a decimal number", str: "text", list: "a list"}
    return names.get(type(value), "a table" if isinstance(value, dict) else "unset")


def _out_of_range(name: str, key: Key | None, value: Any, detail: ErrorDetails) -> ConfigIssue:
    bound_name, words = _RELATIONS[detail["type"]]
    bound = detail["ctx"][bound_name]
    if isinstance(bound, int) and abs(bound) >= 2**63 - 1:
        return ConfigIssue(name, "does not fit in 64 bits", "write a smaller number", value)
    return ConfigIssue(name, f"must be {words} {bound}", _range_fix(key), value)


def _range_fix(key: Key | None) -> str:
    if key is None:
        return "choose a value in range"
    default = "" if key.default is None else f"; the default is {_shown(key.default)}"
    bounds = f" {key.bounds}" if key.bounds else ""
    infinite = re.search("`inf` [^.;]+", key.doc)
    return f"choose a number{bounds}{default}" + (f"; {infinite[0]}" if infinite else "")


def _not_a_choice(name: str, key: Key | None, detail: ErrorDetails, value: Any) -> ConfigIssue:
    choices = list(key.choices) if key else []
    listed = f"choose from {', '.join(choices)}" if choices else str(detail["ctx"]["expected"])
    match = nearest(value, choices) if isinstance(value, str) else None
    fix = f'did you mean "{match}"? Otherwise {listed}' if match else listed
    shown = str(value) if isinstance(value, datetime.date | datetime.time | dict) else value
    return ConfigIssue(name, "is not a choice", fix, shown)


def _unknown(name: str, detail: ErrorDetails, keys: Mapping[str, Key]) -> ConfigIssue:
    """An unknown key of a free-form table, or of a table in a list (`optimizer.param_groups`)."""
    if len(detail["loc"]) == 1:
        return ConfigIssue(name, "is unknown", did_you_mean(str(detail["loc"][0]), keys))
    table, _, last = name.rpartition(".")
    tables = keys.get(table.partition("[")[0])
    known = [key.name for key in keys_of(tables.item)] if tables and tables.item else []
    match = nearest(last, known)
    prefix = f"did you mean `{match}`? " if match else ""
    return ConfigIssue(name, "is unknown", f"{prefix}Keys: {', '.join(known)}")


def _example(key: Key | None) -> str:
    if key is None:
        return "correct the value"
    if key.choices:
        return f"choose from {', '.join(key.choices)}"
    default = _shown(key.default)
    if key.default in (None, (), {}):
        default = {"int": "8", "float": "0.1"}.get(key.kind, "")
    default = default and f", for example {default}"
    words = {
        "bool": "write true or false",
        "int": f"write an integer{default}",
        "float": f"write a number{default}",
        "str": f"write text{default}",
        "strings": 'write a list of texts, for example ["a", "b"]',
        "lists": 'write a list of lists, for example [["a", "b"], ["c"]]',
        "tables": f"write a list of tables, for example {example_table(key)}",
        "table": "write a table",
    }
    return words[key.kind]


def _shown(value: Any) -> str:
    return f'"{value}"' if isinstance(value, str) else str(value).lower()


def _dotted(location: tuple[int | str, ...]) -> str:
    """`("optimizer", "param_groups", 0, "pattern")` as `optimizer.param_groups[0].pattern`."""
    parts = [f"[{part}]" if isinstance(part, int) else f".{part}" for part in location]
    return "".join(parts).lstrip(".")
