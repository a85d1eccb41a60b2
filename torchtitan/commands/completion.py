"""`torchtitan completion`: the script that completes command lines, made by shtab.

It is made from the parser of the command line, to which the settings are added as options, so the
shell needs no Python to complete a word.
"""

import argparse
from collections.abc import Iterable, Mapping, Sequence

import shtab

from torchtitan.commands.config import free_tables
from torchtitan.commands.list import lists
from torchtitan.commands.table import COMMANDS, build_parser
from torchtitan.config.fields import Key, known_keys, known_sections
from torchtitan.config.help_text import ALL, keys_of_tables
from torchtitan.config.shipped import shipped_configs

_CONFIG_FILES = "_torchtitan_config_files"  # shtab knows functions for files by their names


def run(options: argparse.Namespace) -> int:
    """Print the script for a shell."""
    print(script(options.shell))
    return 0


def script(shell: str) -> str:
    """Return the script with which `bash`, `zsh` or `fish` completes `torchtitan`."""
    parser = build_parser()
    keys = [*known_keys().values(), *keys_of_tables(free_tables())]
    _add_candidates(parser, [key for key in keys if key.kind != "table"])
    return shtab.complete(parser, shell=shell)


def _add_candidates(parser: argparse.ArgumentParser, keys: Sequence[Key]) -> None:
    """Say what each argument of a parser, and of those of its commands, may be."""
    topics = dict.fromkeys([*known_sections(), *(key.name for key in keys)])
    names: dict[tuple[str, str], Iterable[str]] = {
        ("torchtitan list", "names"): lists(),
        ("torchtitan config copy", "name"): shipped_configs(),
        ("torchtitan train", "help"): [ALL, *topics],
        ("torchtitan help", "topic"): [*COMMANDS, *topics],
        ("torchtitan train", "check"): ["full"],
    }
    for action in parser._actions:
        if isinstance(action, argparse._SubParsersAction):
            for command in action.choices.values():
                _add_candidates(command, keys)
        elif (parser.prog, action.dest) in names:
            action.choices = list(names[parser.prog, action.dest])
        elif parser.prog == "torchtitan config diff" and action.dest in ("first", "second"):
            action.complete = _config_files(list(shipped_configs()))  # type: ignore[attr-defined]
        elif action.choices is None and action.type is None and action.nargs != 0:
            action.complete = shtab.FILE  # type: ignore[attr-defined]
    if parser.get_default("settings") is not None:
        _add_settings(parser, keys)


def _add_settings(parser: argparse.ArgumentParser, keys: Sequence[Key]) -> None:
    """Add the config file, unless the command names its own arguments, and the settings."""
    if not parser._get_positional_actions():
        file = parser.add_argument("file", nargs="?", help="a TOML, or a config by name")
        file.complete = _config_files(list(shipped_configs()))  # type: ignore[attr-defined]
    registered = {registry.key: list(registry) for registry in lists().values() if registry}
    for key in keys:
        if f"--{key.name}" in parser._option_string_actions:  # of two optimizers, say
            continue
        text = key.doc.partition(". ")[0].replace("%", "%%")
        nargs = {"bool": "?", "strings": "+"}.get(key.kind)
        action = parser.add_argument(f"--{key.name}", help=text, nargs=nargs)
        switch = ("true", "false") if key.kind == "bool" else ()
        action.choices = key.choices or registered.get(key.name) or switch or None
        if key.is_path and not action.choices:
            action.complete = shtab.FILE  # type: ignore[attr-defined]


def _config_files(names: Sequence[str]) -> Mapping[str, object]:
    """Return how each shell completes the name of a shipped config, or a TOML file."""
    words = " ".join(names)
    bash = f"""{_CONFIG_FILES}() {{
  compgen -W "{words}" -- "$1"
  compgen -f -X '!*.toml' -- "$1"
  compgen -d -- "$1"
}}"""
    zsh = f"""{_CONFIG_FILES}() {{
  compadd -- {words}
  _files -g '*.toml'
}}"""
    return {
        "bash": _CONFIG_FILES,
        "zsh": _CONFIG_FILES,
        "fish": f"{words} (__fish_complete_suffix .toml)",
        "preamble": {"bash": bash, "zsh": zsh},
    }
