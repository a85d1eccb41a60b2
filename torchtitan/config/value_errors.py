"""pydantic's errors in the words of whoever wrote the TOML."""

import datetime
from collections.abc import Sequence
from typing import Any

from pydantic import ValidationError
from pydantic_core import ErrorDetails

from torchtitan.config.errors import Problem
from torchtitan.config.fields import Key, keys_of, known_keys
from torchtitan.config.suggest import nearest
from torchtitan.config.training_sections import ParamGroup

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


def problems_of(error: ValidationError, flags: Sequence[str] = ()) -> list[Problem]:
    """One problem per error. `flags` are the keys that came from the command line, where every
    value is text and there are no quotes to take away."""
    return [_problem(detail, set(flags)) for detail in error.errors(include_url=False)]


def _problem(detail: ErrorDetails, flags: set[str]) -> Problem:
    name = _dotted(detail["loc"])
    key = known_keys().get(name)
    value = detail["input"]
    kind = detail["type"]
    if kind in _NEEDS:
        return _wrong_type(name, key, value, kind, name in flags)
    if kind in _RELATIONS:
        return _out_of_range(name, key, value, detail)
    if kind == "finite_number":
        return Problem(name, "is not a finite number", _range_fix(key), value)
    if kind == "literal_error":
        return _not_a_choice(name, detail, value)
    if kind == "missing":
        last = name.rpartition(".")[2]
        return Problem(name, "is missing", f"add `{last} = ...`")
    if kind == "extra_forbidden":
        return _unknown_in_list(name)
    if kind == "value_error":
        problem, _, fix = str(detail["ctx"]["error"]).partition(". Fix: ")
        return Problem(name, problem, fix or "correct the value", value)
    return Problem(name, detail["msg"], _example(key), value)


def _wrong_type(name: str, key: Key | None, value: Any, kind: str, is_flag: bool) -> Problem:
    needed = _NEEDS[kind]
    if is_flag:
        return Problem(name, f"needs {needed}", _example(key), value)
    fix = _example(key)
    if kind == "int_type" and isinstance(value, float) and value.is_integer():
        fix = f"write {int(value)}"
    elif kind in ("int_type", "float_type", "bool_type") and isinstance(value, str):
        fix = _without_quotes(value, kind) or fix
    elif kind in ("tuple_type", "list_type") and isinstance(value, str):
        fix = f'write ["{value}"]'
    elif kind == "string_type" and not isinstance(value, list | dict):
        fix = f'write "{value}"'
    shown = str(value) if isinstance(value, datetime.date | datetime.time | dict) else value
    return Problem(name, f"needs {needed}, and this is {_describe(value)}", fix, shown)


def _without_quotes(value: str, kind: str) -> str | None:
    text = value.strip()
    if kind == "bool_type":
        word = text.lower()
        return f"write {word}, without quotes" if word in ("true", "false") else None
    try:
        number = float(text)
    except ValueError:
        return None
    if kind == "int_type":
        return f"write {int(number)}, without quotes" if number.is_integer() else None
    return f"write {text}, without quotes"


def _describe(value: Any) -> str:
    if isinstance(value, bool):
        return "a boolean"
    if isinstance(value, datetime.date | datetime.time):
        return "a date"
    names = {int: "an integer", float: "a decimal number", str: "text", list: "a list"}
    return names.get(type(value), "a table" if isinstance(value, dict) else "unset")


def _out_of_range(name: str, key: Key | None, value: Any, detail: ErrorDetails) -> Problem:
    bound_name, words = _RELATIONS[detail["type"]]
    bound = detail["ctx"][bound_name]
    if isinstance(bound, int) and abs(bound) >= 2**63 - 1:
        return Problem(name, "does not fit in 64 bits", "write a smaller number", value)
    return Problem(name, f"must be {words} {bound}", _range_fix(key), value)


def _range_fix(key: Key | None) -> str:
    if key is None:
        return "choose a value in range"
    default = "" if key.default is None else f"; the default is {_shown(key.default)}"
    bounds = f" {key.bounds}" if key.bounds else ""
    return f"choose a number{bounds}{default}"


def _not_a_choice(name: str, detail: ErrorDetails, value: Any) -> Problem:
    key = known_keys().get(name)
    choices = list(key.choices) if key else []
    listed = f"choose from {', '.join(choices)}" if choices else str(detail["ctx"]["expected"])
    match = nearest(value, choices) if isinstance(value, str) else None
    fix = f'did you mean "{match}"? Otherwise {listed}' if match else listed
    shown = str(value) if isinstance(value, datetime.date | datetime.time | dict) else value
    return Problem(name, "is not a choice", fix, shown)


def _unknown_in_list(name: str) -> Problem:
    """A key of a table inside a list (`optimizer.param_groups`), which no flat table knows."""
    keys = [key.name for key in keys_of(ParamGroup)]
    match = nearest(name.rpartition(".")[2], keys)
    prefix = f"did you mean `{match}`? " if match else ""
    return Problem(name, "is unknown", f"{prefix}Keys: {', '.join(keys)}")


def _example(key: Key | None) -> str:
    if key is None:
        return "correct the value"
    if key.choices:
        return f"choose from {', '.join(key.choices)}"
    default = "" if key.default in (None, (), {}) else f", for example {_shown(key.default)}"
    words = {
        "bool": "write true or false",
        "int": f"write an integer{default}",
        "float": f"write a number{default}",
        "str": f"write text{default}",
        "strings": 'write a list of texts, for example ["a", "b"]',
        "tables": 'write a list of tables, for example [{pattern = "*bias"}]',
        "table": "write a table",
    }
    return words[key.kind]


def _shown(value: Any) -> str:
    return f'"{value}"' if isinstance(value, str) else str(value).lower()


def _dotted(location: tuple[int | str, ...]) -> str:
    """`("optimizer", "param_groups", 0, "pattern")` as `optimizer.param_groups[0].pattern`."""
    parts = [f"[{part}]" if isinstance(part, int) else f".{part}" for part in location]
    return "".join(parts).lstrip(".")
