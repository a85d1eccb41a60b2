"""List every key of a config in one flat table, read from the sections.

The command line, the error messages and the reference page are made from it.
"""

import types
import typing
from collections.abc import Iterable, Iterator
from dataclasses import dataclass
from functools import cache
from typing import Annotated, Any, Literal, NamedTuple

import annotated_types
from pydantic.fields import FieldInfo

from torchtitan.config.errors import ConfigIssue
from torchtitan.config.paths import IS_PATH, why_unexpanded
from torchtitan.config.schema import JobConfig, Section
from torchtitan.config.toml_text import toml_value

_HUGE = 2**31
_EXAMPLES = {
    "bool": "true",
    "int": "8",
    "float": "0.5",
    "str": '"text"',
    "strings": '["a", "b"]',
    "lists": '[["a", "b"], ["c"]]',
    "table": "{n_layers = 4}",
}


class TopKey(NamedTuple):
    """A key above the first section: it says how to read the file, and is no setting."""

    doc: str
    example: str


BASE, UNSET = "base", "unset"
TOP_KEYS = {
    BASE: TopKey(
        "The TOML whose settings this one starts from: a config that comes with the library, by its"
        " name, or a path, which starts in the folder of this file.",
        'base = "llama3_8b"',
    ),
    UNSET: TopKey(
        "Settings and tables of the base that this file leaves out, by their dotted names.",
        'unset = ["model.tokenizer_path"]',
    ),
}


@dataclass(frozen=True)
class Key:
    """One setting. `kind` is how its value is written in TOML and on the command line."""

    name: str
    kind: Literal["bool", "int", "float", "str", "choice", "strings", "lists", "tables", "table"]
    doc: str
    default: Any
    optional: bool = False
    choices: tuple[str, ...] = ()
    bounds: str = ""
    item: type[Section] | None = None
    """Section that each table of a list of tables holds."""
    is_path: bool = False
    own_example: Any = None
    """A valid value, given where the default says nothing."""

    @property
    def section(self) -> str:
        """Return the dotted name of the table that holds the key."""
        return self.name.rpartition(".")[0]

    @property
    def last_name(self) -> str:
        """Return the name without its section."""
        return self.name.rpartition(".")[2]

    @property
    def example(self) -> str:
        """Return a value in TOML: the default if that says anything, else an example."""
        if self.choices:
            return f'"{self.choices[0]}"'
        if self.kind == "tables":
            keys = keys_of(self.item) if self.item is not None else []
            required = [key for key in keys if key.default is None and not key.optional]
            return f"[{{{', '.join(f'{key.last_name} = {key.example}' for key in required)}}}]"
        if self.default not in (None, "", (), {}):
            return toml_value(self.default)
        if self.own_example is not None:
            return toml_value(self.own_example)
        return _EXAMPLES[self.kind]


@cache
def known_keys() -> dict[str, Key]:
    """Return all keys by dotted name, in the order of the sections."""
    return {key.name: key for key in _walk(JobConfig, "")}


@cache
def known_sections() -> dict[str, str]:
    """Return the dotted names of all tables with their documentation, nested ones last."""
    return dict(_walk_sections(JobConfig, ""))


def free_table_of(name: str) -> str | None:
    """Return the free-form table (`model.args`, `handlers`) that a dotted name lies in, if any."""
    tables = [key.name for key in known_keys().values() if key.kind == "table"]
    return next((table for table in tables if name.startswith(table + ".")), None)


def keys_of(model: type[Section]) -> list[Key]:
    """Return the keys of one section alone, by their last names."""
    return list(_walk(model, ""))


def unexpanded_paths(config: JobConfig) -> Iterator[ConfigIssue]:
    """Yield an issue for each path with a variable that is not set: a folder called `$NAME`."""
    for name, path in paths_of(config):
        reason = why_unexpanded(path)
        if reason:
            fix = "set it where the run starts, or write the folder itself"
            yield ConfigIssue(name, reason, fix, path, missing_asset=True)


def paths_of(config: JobConfig) -> Iterator[tuple[str, str]]:
    """Yield the dotted name and value of every path of a config."""
    return _paths_in(config.model_dump(), known_keys().values(), "")


def _paths_in(table: Any, keys: Iterable[Key], prefix: str) -> Iterator[tuple[str, str]]:
    for key in keys:
        value = table
        for part in key.name.split("."):
            value = value[part]
        if key.is_path and value:
            yield prefix + key.name, value
        for index, inner in enumerate(value if key.item else ()):
            assert key.item is not None
            yield from _paths_in(inner, keys_of(key.item), f"{prefix}{key.name}[{index}].")


def _walk(model: type[Section], prefix: str) -> Iterator[Key]:
    for field_name, field in model.model_fields.items():
        name = prefix + field_name
        base, optional, metadata = _unwrap(field.annotation, list(field.metadata))
        if isinstance(base, type) and issubclass(base, Section):
            yield from _walk(base, name + ".")
        else:
            yield _key(name, field, base, optional, metadata)


def _walk_sections(model: type[Section], prefix: str) -> Iterator[tuple[str, str]]:
    for field_name, field in model.model_fields.items():
        base, _, _ = _unwrap(field.annotation, [])
        is_section = isinstance(base, type) and issubclass(base, Section)
        if is_section or typing.get_origin(base) is dict:
            yield prefix + field_name, field.description or (is_section and base.__doc__) or ""
        if is_section:
            yield from _walk_sections(base, prefix + field_name + ".")


def _key(name: str, field: FieldInfo, base: Any, optional: bool, metadata: list[Any]) -> Key:
    kind, choices = _kind(name, base)
    return Key(
        name=name,
        kind=kind,
        doc=" ".join((field.description or "").split()),
        default=None if field.is_required() else field.get_default(call_default_factory=True),
        optional=optional,
        choices=choices,
        bounds=_bounds(metadata) if kind in ("int", "float") else "",
        item=_item(base) if kind == "tables" else None,
        is_path=IS_PATH in metadata,
        own_example=next(iter(field.examples or ()), None),
    )


def _kind(name: str, base: Any) -> tuple[Any, tuple[str, ...]]:
    scalars = {bool: "bool", int: "int", float: "float", str: "str"}
    if base in scalars:
        return scalars[base], ()
    origin = typing.get_origin(base)
    if origin is Literal:
        values = typing.get_args(base)
        return ("choice", values) if isinstance(values[0], str) else ("int", ())
    if origin is dict:
        return "table", ()
    if origin is tuple:
        item = _item(base)
        if item is str:
            return "strings", ()
        return ("lists" if typing.get_origin(item) is tuple else "tables"), ()
    raise AssertionError(f"{name}: no way to write a {base} in TOML")


def _item(base: Any) -> Any:
    """Return the type of a tuple's items."""
    item, *_ = _unwrap(typing.get_args(base)[0], [])
    return item


def _unwrap(annotation: Any, metadata: list[Any]) -> tuple[Any, bool, list[Any]]:
    """Return the type inside `Annotated` and `| None`, whether None fits, and the constraints."""
    origin = typing.get_origin(annotation)
    if origin is Annotated:
        base, *extra = typing.get_args(annotation)
        return _unwrap(base, metadata + extra)
    if origin in (typing.Union, types.UnionType):
        (member,) = [arg for arg in typing.get_args(annotation) if arg is not type(None)]
        base, _, metadata = _unwrap(member, metadata)
        return base, True, metadata
    return annotation, False, metadata


def _bounds(metadata: list[Any]) -> str:
    lower, upper = [], []
    for item in _flat(metadata):
        if isinstance(item, annotated_types.Gt):
            lower.append(f"> {item.gt}")
        elif isinstance(item, annotated_types.Ge) and abs(item.ge) < _HUGE:  # type: ignore[arg-type]
            lower.append(f">= {item.ge}")
        elif isinstance(item, annotated_types.Lt):
            upper.append(f"< {item.lt}")
        elif isinstance(item, annotated_types.Le) and abs(item.le) < _HUGE:  # type: ignore[arg-type]
            upper.append(f"<= {item.le}")
    return ", ".join(lower + upper)


def _flat(metadata: list[Any]) -> Iterator[Any]:
    for item in metadata:
        if isinstance(item, FieldInfo):
            yield from _flat(list(item.metadata))
        else:
            yield item
