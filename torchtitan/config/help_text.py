"""`torchtitan train --help`: tyro renders the table of keys, so the help knows every setting.

tyro is given plain dataclasses made from that table rather than the sections themselves, whose
free-form tables and lists of tables it would leave out.
"""

import dataclasses
from collections.abc import Mapping
from typing import Annotated, Any, Literal

from torchtitan.config.fields import Key, keys_of, known_keys, known_sections
from torchtitan.config.schema import Section
from torchtitan.config.toml_text import toml_value

_DESCRIPTION = """Train from a TOML file: torchtitan train FILE [--section.key value ...]

Every setting below can stand in the file or on the command line, which wins. Lists take spaces or \
commas, and where TOML is asked for brackets: '["a", "b"]'; switches take --x, --x true, --x false \
or --no-x.

--check looks whether the run could start, for WORLD_SIZE processes, without this machine's \
hardware; --check full includes it."""


NamedTables = Mapping[str, Mapping[str, type[Section]]]


def print_help(named: NamedTables | None = None) -> None:
    """Print all settings with their documentation and defaults. `named`: of a table with a table
    for each name (`handlers`), what these may hold, by name."""
    import tyro

    try:
        tyro.cli(
            _dataclass_of("", named or {}),
            prog="torchtitan train",
            description=_DESCRIPTION,
            args=["--help"],
            use_underscores=True,
        )
    except SystemExit:  # how an argument parser ends its help
        return


def _dataclass_of(section: str, named: NamedTables) -> type:
    """A dataclass of the keys and tables right below a section; "" is the whole config."""
    keys = [key for key in known_keys().values() if key.section == section]
    inner: dict[str, type] = {}
    for name in known_sections():
        if name.rpartition(".")[0] != section:
            continue
        if named.get(name):
            inner[name] = _dataclass_of_names(name, named[name])
        elif name not in known_keys():
            inner[name] = _dataclass_of(name, named)
    keys = [key for key in keys if key.name not in inner]
    return _dataclass(section or "Settings", keys, inner, known_sections().get(section, ""))


def _dataclass_of_names(section: str, models: Mapping[str, type[Section]]) -> type:
    inner = {}
    for name, model in models.items():
        try:
            keys = keys_of(model)
        except (AssertionError, ValueError):
            continue  # somebody's own, of a type that the table of keys has no word for
        if name.isidentifier():
            made = [_as_toml(key) for key in keys]
            inner[name] = _dataclass(f"{section}.{name}", made, {}, f"Settings of {name}.")
    return _dataclass(section, [], inner, known_sections()[section])


def _as_toml(key: Key) -> Key:
    """What a free-form table holds is TOML: nobody knows there that a list or a switch is
    meant."""
    return dataclasses.replace(key, kind="table") if key.kind in ("strings", "bool") else key


def _dataclass(name: str, keys: list[Key], inner: Mapping[str, type], doc: str) -> type:
    fields: list[tuple[str, Any, Any]] = [(key.last_name, *_field(key)) for key in keys]
    for table, made in inner.items():
        fields.append((table.rpartition(".")[2], made, dataclasses.field(default_factory=made)))
    whole = dataclasses.make_dataclass(name.replace(".", "_"), fields)
    whole.__doc__ = doc
    return whole


def _field(key: Key) -> tuple[Any, Any]:
    import tyro

    scalars = {"bool": bool, "int": int, "float": float, "str": str, "strings": tuple[str, ...]}
    default = key.default
    metavar = None
    base: Any
    if key.kind == "choice":
        base = Literal[key.choices]
    elif key.kind in ("table", "tables", "lists"):
        base, default, metavar = str, toml_value(default), "TOML"
    else:
        base = scalars[key.kind]
    if key.optional or default is None:  # or it has to be given
        base = base | None
    help_text = f"{key.doc} ({key.bounds})" if key.bounds else key.doc
    annotated = Annotated[base, tyro.conf.arg(help=help_text, metavar=metavar)]
    return annotated, dataclasses.field(default=default)
