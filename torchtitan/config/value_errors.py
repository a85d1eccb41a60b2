"""Say what is wrong with a value in terms of the TOML, from pydantic's errors."""

import datetime
from collections.abc import Mapping, Sequence
from typing import Any

from pydantic import ValidationError
from pydantic_core import ErrorDetails

from torchtitan.config.errors import ConfigIssue
from torchtitan.config.fields import Key, keys_of
from torchtitan.config.schema import MAX_INT64, Section
from torchtitan.config.suggest import did_you_mean

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
_BOUNDS = {
    "greater_than": ("gt", "more than"),
    "greater_than_equal": ("ge", "at least"),
    "less_than": ("lt", "less than"),
    "less_than_equal": ("le", "at most"),
}
_TYPES = {bool: "a boolean", int: "an integer", float: "a decimal number", str: "text"}
_TYPES |= {list: "a list", dict: "a table"}


def problems_of_table(
    error: ValidationError, table: str, settings: type[Section]
) -> list[ConfigIssue]:
    """Return an issue per error of a free-form table, such as `model.args`."""
    try:
        keys = {key.name: key for key in keys_of(settings)}
    except (AssertionError, ValueError):  # registered settings of types that TOML lacks
        keys = {}
    return problems_of(error, keys, prefix=table + ".")


def problems_of(
    error: ValidationError, keys: Mapping[str, Key], prefix: str = "", flags: Sequence[str] = ()
) -> list[ConfigIssue]:
    """Return an issue per error of a config.

    `flags` are the keys that came from the command line, where every value is text.
    """
    found = []
    for detail in error.errors(include_url=False):
        name, value = _dotted(detail["loc"]), detail["input"]
        key = keys.get(name) or keys.get(name.partition("[")[0])
        text, fix = _describe(detail, key, keys, name in flags)
        missing = {} if detail["type"] in ("missing", "extra_forbidden") else {"value": value}
        if isinstance(value, datetime.date | datetime.time | dict) and missing:
            missing = {"value": str(value)}
        found.append(ConfigIssue(prefix + name, text, fix, **missing))
    return found


def _describe(
    detail: ErrorDetails, key: Key | None, keys: Mapping[str, Key], is_flag: bool
) -> tuple[str, str]:
    """Return what is wrong, and the fix."""
    kind, value, context = detail["type"], detail["input"], detail.get("ctx", {})
    if kind in _NEEDS:
        return _wrong_type(_NEEDS[kind], value, key, is_flag)
    if kind in _BOUNDS:
        name, relation = _BOUNDS[kind]
        if isinstance(context[name], int) and abs(context[name]) >= MAX_INT64:
            return "does not fit in 64 bits", "write a smaller number"
        return f"must be {relation} {context[name]}", _in_range(key)
    if kind == "finite_number":
        return "is not a finite number", _in_range(key)
    if kind == "literal_error":
        choices = key.choices if key else ()
        fix = did_you_mean(str(value), choices) if choices else f"set it to {context['expected']}"
        return "is not a choice", fix
    if kind == "missing":
        return "is missing", f"add `{detail['loc'][-1]} = ...`"
    if kind == "extra_forbidden":
        return "is unknown", did_you_mean(str(detail["loc"][-1]), _siblings(detail["loc"], keys))
    if kind == "value_error":
        text, _, fix = str(context["error"]).partition(". Fix: ")
        return text, fix or "correct the value"
    return detail["msg"], "correct the value"


def _wrong_type(needs: str, value: Any, key: Key | None, is_flag: bool) -> tuple[str, str]:
    """Return what is wrong with a value's type, and the fix. On the command line all is text."""
    fix = f"write {needs}"
    if key is not None and key.kind != "bool":
        fix += f", for example {key.example}"
    if is_flag:
        return f"needs {needs}", fix
    if isinstance(value, str) and needs in ("an integer", "a number", "true or false"):
        fix += ", without quotes"
    return f"needs {needs}, and this is {_TYPES.get(type(value), 'a date')}", fix


def _siblings(location: tuple[int | str, ...], keys: Mapping[str, Key]) -> list[str]:
    """Return the keys of the free-form table, or of the table in a list, that holds a key."""
    if len(location) == 1:
        return list(keys)
    table = keys.get(_dotted(location).partition("[")[0])
    return [key.name for key in keys_of(table.item)] if table and table.item else []


def _in_range(key: Key | None) -> str:
    if key is None or key.kind not in ("int", "float"):
        return "choose a value in range"
    default = "" if key.default is None else f"; the default is {key.example}"
    infinite = ", or `inf`" if "`inf`" in key.doc else ""
    return f"choose a number{key.bounds and ' '}{key.bounds}{infinite}{default}"


def _dotted(location: tuple[int | str, ...]) -> str:
    """Return `("data", "sources", 0, "weight")` as `data.sources[0].weight`."""
    parts = [f"[{part}]" if isinstance(part, int) else f".{part}" for part in location]
    return "".join(parts).lstrip(".")
