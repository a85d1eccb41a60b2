"""`torchtitan train --help`: every setting with its documentation and default, by argparse."""

import argparse
from collections.abc import Mapping, Sequence
from dataclasses import replace
from typing import Any

from torchtitan.config.fields import Key, keys_of, known_keys, known_sections
from torchtitan.config.schema import Section
from torchtitan.config.toml_text import toml_value

_DESCRIPTION = """Train from a TOML file.

Every setting below can be in the file or on the command line, which wins. Lists take spaces or
commas, or brackets where TOML is shown: '["a", "b"]'; switches take --x, --x true, --x false or
--no-x.

--check only checks that the run could start, with WORLD_SIZE processes, ignoring the hardware of
this machine; --check full includes it."""
_METAVARS = {
    "bool": "[{true,false}]",
    "int": "INT",
    "float": "FLOAT",
    "str": "TEXT",
    "strings": "TEXT,TEXT",
}


def print_help(named: Mapping[str, Mapping[str, type[Section]]] | None = None) -> None:
    """Print all settings. `named`: the settings in tables such as `handlers`, by table and name."""
    parser = argparse.ArgumentParser(
        usage="torchtitan train [FILE] [--section.key value ...] [--check [full]]",
        description=_DESCRIPTION,
        formatter_class=argparse.RawDescriptionHelpFormatter,
        add_help=False,
    )
    for section, doc in known_sections().items():
        keys = [key for key in known_keys().values() if key.section == section]
        if section in known_keys() and "." not in section:
            keys.append(known_keys()[section])
        _add_group(parser, section, doc, keys)
        for name, model in (named or {}).get(section, {}).items():
            try:
                keys = keys_of(model)
            except (AssertionError, ValueError):
                continue  # a custom type that the table of keys cannot describe
            table = f"{section}.{name}"
            # Types are unknown when the command line is read, so lists and switches are TOML.
            keys = [replace(key, name=f"{table}.{key.name}") for key in keys]
            _add_group(parser, table, f"Settings of {name}.", keys, ("strings", "bool"))
    parser.print_help()


def _add_group(
    parser: argparse.ArgumentParser, title: str, doc: str, keys: list[Key], toml: Sequence[str] = ()
) -> None:
    """Add the keys; those whose kind is in `toml` are written as TOML."""
    group: Any = parser.add_argument_group(f"[{title}]", doc)
    for key in keys:
        metavar = "TOML" if key.kind in toml else _METAVARS.get(key.kind, "TOML")
        metavar = f"{{{','.join(key.choices)}}}" if key.choices else metavar
        bounds = f" ({key.bounds})" if key.bounds else ""
        default = "unset" if key.default is None else toml_value(key.default)
        text = f"{key.doc}{bounds} (default: {default})".replace("%", "%%")
        group.add_argument(f"--{key.name}", metavar=metavar, help=text)
