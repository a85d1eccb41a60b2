"""`torchtitan train --help`: tyro renders the table of keys, so the help knows every setting.

tyro is given plain dataclasses made from that table rather than the sections themselves, whose
free-form tables and lists of tables it would leave out.
"""

import dataclasses
from typing import Annotated, Any, Literal

from torchtitan.config.fields import Key, known_keys, known_sections
from torchtitan.config.toml_text import toml_value

_DESCRIPTION = """Train from a TOML file: torchtitan train FILE [--section.key value ...]

Every setting below can stand in the file or on the command line, which wins. Lists take spaces or \
commas; switches take --x, --x true, --x false or --no-x.

--check looks whether the run could start, for WORLD_SIZE processes, without this machine's \
hardware; --check full includes it."""


def print_help() -> None:
    """Print all settings with their documentation and defaults."""
    import tyro

    try:
        tyro.cli(
            _dataclass_of(""),
            prog="torchtitan train",
            description=_DESCRIPTION,
            args=["--help"],
            use_underscores=True,
        )
    except SystemExit:  # how an argument parser ends its help
        return


def _dataclass_of(section: str) -> type:
    """A dataclass of the keys and tables right below a section; "" is the whole config."""
    fields: list[tuple[str, Any, Any]] = []
    for key in known_keys().values():
        if key.section == section:
            fields.append((key.last_name, *_field(key)))
    for name in known_sections():
        if name.rpartition(".")[0] == section and name not in known_keys():
            inner = _dataclass_of(name)
            default = dataclasses.field(default_factory=inner)
            fields.append((name.rpartition(".")[2], inner, default))
    made = dataclasses.make_dataclass(section.replace(".", "_") or "Settings", fields)
    made.__doc__ = known_sections().get(section, "")
    return made


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
    if key.optional:
        base = base | None
    help_text = f"{key.doc} ({key.bounds})" if key.bounds else key.doc
    annotated = Annotated[base, tyro.conf.arg(help=help_text, metavar=metavar)]
    return annotated, dataclasses.field(default=default)
