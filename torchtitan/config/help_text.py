"""`torchtitan train --help`: an overview, a section, one setting, or every setting."""

import argparse
import re
import shlex
import textwrap
from collections.abc import Iterable, Iterator, Mapping
from dataclasses import dataclass, replace
from functools import cache
from typing import Any

from torchtitan.config.compat.keys import MISNAMED, OLD_KEYS, TODAY
from torchtitan.config.errors import ConfigError, ConfigIssue
from torchtitan.config.fields import TOP_KEYS, Key, keys_of, known_keys, known_sections
from torchtitan.config.reference import KINDS, NAMED_TABLES
from torchtitan.config.schema import Section
from torchtitan.config.shipped import shipped_configs
from torchtitan.config.suggest import nearest
from torchtitan.config.toml_file import parse_value, read_toml
from torchtitan.config.toml_text import toml_value

OVERVIEW = "overview"
ALL = "all"
_USAGE = "usage: torchtitan train [FILE] [--section.key value ...] [--check [full]]"
_OVERVIEW = """Train from a TOML file: a path, or the name of a config that comes with the library
(`torchtitan list configs`). Every setting can be in the file or on the command line, which wins.

  torchtitan train debug_model                        a small model, on any machine
  torchtitan train my.toml --training.steps 100 --model.handlers compile,float8
  torchtitan train my.toml --check                    only check that it could start
  torchrun --nproc_per_node 8 -m torchtitan train llama3_8b      a process a GPU

--check is for WORLD_SIZE processes, and ignores the hardware of this machine; --check full does
not. The same command again resumes the run."""
_ALL = """Train from a TOML file.

Every setting below can be in the file or on the command line, which wins. Lists take spaces or
commas, or brackets where TOML is shown: '["a", "b"]'; switches take --x, --x true, --x false or
--no-x.

--check only checks that the run could start, with WORLD_SIZE processes, ignoring the hardware of
this machine; --check full includes it."""
_GO_ON = """Go on:
  torchtitan train --help SECTION    the settings of a section, such as training or handlers.lora
  torchtitan train --help KEY        one setting with an example, such as training.steps or lr
  torchtitan train --help all        every setting
  torchtitan config show FILE        the values that a run would have, and where each comes from"""
_METAVARS = {
    "bool": "[{true,false}]",
    "int": "INT",
    "float": "FLOAT",
    "str": "TEXT",
    "strings": "TEXT,TEXT",
}
_WIDTH = 96

Tables = Mapping[str, Mapping[str, type[Section]]]
"""Settings in free-form tables such as `handlers` and `loss.args`, by table and name."""


@dataclass(frozen=True)
class _Group:
    """A table of settings; several have the name `loss.args`, one a loss."""

    name: str
    title: str
    doc: str
    keys: list[Key]
    is_free: bool = False
    """Types are unknown when the command line is read, so lists and switches are TOML there."""
    has_defaults: bool = True


def print_help(tables: Tables | None = None, topic: str = ALL) -> None:
    """Print the help on a topic: a section, a setting, "overview" or "all".

    Raises:
        ConfigError: no such section or setting.
    """
    groups = list(_groups(tables or {}))
    if topic == OVERVIEW:
        print("\n\n".join([_USAGE, _OVERVIEW, _section_list(), _GO_ON]))
    elif topic == ALL:
        parts = [f"{_USAGE}\n\n{_ALL}\n", *(_argparse_text(group) for group in groups)]
        print("\n".join(parts), end="")
    else:
        print(_topic_text(topic, groups))


def keys_of_tables(tables: Tables) -> list[Key]:
    """Return the settings in free-form tables, by their dotted names; some may come twice."""
    return [key for group in _groups(tables) if group.is_free for key in group.keys]


def _groups(tables: Tables) -> Iterator[_Group]:
    """Yield the sections, and below each the tables that are named after what they configure."""
    for section, doc in known_sections().items():
        keys = [key for key in known_keys().values() if key.section == section]
        if section in known_keys() and "." not in section:
            keys.append(known_keys()[section])
        yield _Group(section, f"[{section}]", " ".join(doc.split()), keys)
        models = tables.get(section, {})
        for model in dict.fromkeys(models.values()):
            names = [name for name, other in models.items() if other is model]
            for name in names if section in NAMED_TABLES else [", ".join(names)]:
                table = f"{section}.{name}" if section in NAMED_TABLES else section
                title = f"[{table}]" if section in NAMED_TABLES else f"[{section}] of {name}"
                doc = f"Settings of {name}."
                try:
                    found = keys_of(model)
                except (AssertionError, ValueError):
                    continue  # a custom type that the table of keys cannot describe
                keys = [replace(key, name=f"{table}.{key.name}") for key in found]
                defaults = section != "model.args"  # those are the flavor's
                yield _Group(table, title, doc, keys, True, defaults)


def _section_list() -> str:
    rows = ["Sections:"]
    width = max(map(len, known_sections()))
    for section, doc in known_sections().items():
        first, _, _ = f"{' '.join(doc.split())} ".partition(". ")
        text = textwrap.shorten(first, _WIDTH - width - 4, placeholder=" ...")
        rows.append(f"  {section:<{width}}  {text}")
    return "\n".join(rows)


def _topic_text(topic: str, groups: list[_Group]) -> str:
    name = topic.strip("[]").removeprefix("--").replace("-", "_")
    today = TODAY.get(name) or MISNAMED.get(name)
    if top := TOP_KEYS.get(today or name):
        return (
            f"{_indented(top.doc, 0, 0)}\n\nAbove the first section of the TOML:\n\n  {top.example}"
        )
    note = f"{name} is {today} here.\n\n" if today else ""
    name = today or name
    keys = [(key, group) for group in groups for key in group.keys]
    sections = [group for group in groups if group.name == name]
    if name in NAMED_TABLES or any(group.keys for group in sections):
        return note + _section_text(name, sections, groups)
    found = [(key, group) for key, group in keys if key.name == name]
    if not found and "." not in name:  # without its section
        sections = [group for group in groups if group.name.rpartition(".")[2] == name]
        if sections:
            return _section_text(sections[0].name, sections, groups)
        if chosen := [g for g in groups if topic in g.title.partition(" of ")[2].split(", ")]:
            return note + "\n\n".join(_argparse_text(group).rstrip() for group in chosen)
        older = {n for old, n in (TODAY | MISNAMED).items() if old.rpartition(".")[2] == name}
        found = [(key, group) for key, group in keys if key.last_name == name or key.name in older]
        if len({key.name for key, _ in found}) == 1 and found[0][0].last_name != name:
            note = f"{name} is {found[0][0].name} here.\n\n"
    if not found:
        raise ConfigError(_unknown(topic, name, groups))
    if len({key.name for key, _ in found}) == 1:
        alike: dict[str, list[tuple[Key, _Group]]] = {}
        for key, group in found:
            alike.setdefault(repr(key), []).append((key, group))
        return note + "\n\n".join(
            _key_text(same[0][0], [g for _, g in same]) for same in alike.values()
        )
    return "\n".join(_argparse_text(replace(group, keys=[key])) for key, group in found).rstrip()


def _unknown(topic: str, name: str, groups: list[_Group]) -> ConfigIssue:
    """Return the issue of a topic that is neither a section nor a setting."""
    known = [group.name for group in groups]
    known += [key.name for group in groups for key in group.keys]
    short = [] if "." in name else [full.rpartition(".")[2] for full in known]
    match = nearest(name, [*known, *short])
    if name in OLD_KEYS:
        problem = "is a setting of TorchTitan that is not needed, or not there yet"
        fix = "docs/start/from_torchtitan.md says what to do instead"
        return ConfigIssue(f"help {topic}", problem, fix)
    hint = f'did you mean "{match}"? ' if match else ""
    if older := [today for old, today in TODAY.items() if old.startswith(f"{name}.")]:
        hint = f"its keys are {', '.join(dict.fromkeys(older))} here; "
    fix = f"{hint}`torchtitan train --help` lists the sections"
    return ConfigIssue(f"help {topic}", "is not a section or a setting", fix)


def _section_text(name: str, sections: list[_Group], groups: list[_Group]) -> str:
    """Return the settings of one section, or the names of the tables below it."""
    below = [group for group in groups if group.name.startswith(f"{name}.")]
    shown = [group for group in sections if group.keys] or sections
    if name in NAMED_TABLES:
        shown = [replace(sections[0], keys=[])]
    parts = [_argparse_text(group).rstrip() for group in shown]
    if below:
        rows = []
        for group in below:
            names = [key.last_name for key in group.keys]
            rows += [f"  {group.title}: " + ", ".join(names)] if names else []
        lines = (textwrap.fill(row, _WIDTH, subsequent_indent=" " * 6) for row in rows)
        parts.append("Tables:\n" + "\n".join(lines))
    keys = [key for group in [*shown, *below] for key in group.keys]
    if keys:
        parts.append(f"`torchtitan train --help {keys[0].name}` shows one with an example.")
    return "\n\n".join(parts)


def _argparse_text(group: _Group) -> str:
    """Return a table of settings as argparse shows options."""
    parser = argparse.ArgumentParser(
        usage=argparse.SUPPRESS,
        formatter_class=argparse.RawDescriptionHelpFormatter,
        add_help=False,
    )
    options: Any = parser.add_argument_group(group.title, textwrap.fill(group.doc, _WIDTH))
    for key in group.keys:
        metavar = _METAVARS.get(key.kind, "TOML")
        if group.is_free and key.kind in ("strings", "bool"):
            metavar = "TOML"
        metavar = f"{{{','.join(key.choices)}}}" if key.choices else metavar
        bounds = f" ({key.bounds})" if key.bounds else ""
        text = f"{key.doc}{bounds} (default: {_default(key, group)})".replace("%", "%%")
        options.add_argument(f"--{key.name}", metavar=metavar, help=text)
    return parser.format_help()


def _default(key: Key, group: _Group) -> str:
    if not group.has_defaults:
        return "the flavor's"
    required = key.default is None and not key.optional
    return "none, it is required" if required else toml_value(key.default)


def _key_text(key: Key, groups: list[_Group]) -> str:
    """Return the help on one setting, which is the same in all of these tables."""
    group = groups[0]
    values = _shipped_values(key.name)
    toml = example(key, values.values())
    kind = " | ".join(key.choices) or f"{'path' if key.is_path else KINDS[key.kind]} {key.bounds}"
    of = ", ".join(filter(None, (group.title.partition(" of ")[2] for group in groups)))
    head = f"{key.name}{of and ' of '}{of}: {kind.rstrip()} (default: {_default(key, group)})"
    parts = [textwrap.fill(head, _WIDTH), _indented(key.doc)]
    if key.item is not None:
        items = (_indented(f"  {i.last_name}: {i.doc}", 6) for i in keys_of(key.item))
        parts.append("\n".join(["Each table has:", "", *items]))
    parts.append(f"In the TOML:\n\n{_toml_lines(key, toml)}")
    flag = command_line_example(key, toml, group.is_free)
    parts.append(f"On the command line:\n\n  torchtitan train my.toml {flag}")
    if values:
        parts.append(
            "\n".join(["Set by configs that come with the library:", "", *_by_value(values)])
        )
    if related := _related(key, group):
        parts.append(_indented(f"See also: {', '.join(related)}", 2, first=0))
    older = [old for old, today in TODAY.items() if today == key.name]
    if older:
        parts.append(_indented(f"Older names, of TorchTitan: {', '.join(older)}", 2, first=0))
    return "\n\n".join(parts)


def example(key: Key, shipped: Iterable[Any] = ()) -> str:
    """Return a value in TOML that differs from the default, if possible one of shipped configs."""
    own = [text for text in map(toml_value, shipped) if text != toml_value(key.default)]
    if own:
        return max(own, key=own.count)
    if key.kind == "tables" and key.default:
        return toml_value(key.default)
    if key.kind == "bool":
        return toml_value(not key.default)
    others = [choice for choice in key.choices if choice != key.default]
    return f'"{others[0]}"' if others else key.example


def command_line_example(key: Key, toml: str, is_free: bool = False) -> str:
    """Return the flag, quoted for a shell, that means the value `toml`."""
    text = toml
    if key.kind in ("str", "choice") and toml.startswith('"') and "\\" not in toml:
        text = toml[1:-1]
    elif key.kind == "strings" and not is_free:
        text = ",".join(re.findall(r'"([^"]*)"', toml)) or toml
    return f"--{key.name} {shlex.quote(text)}"


def _toml_lines(key: Key, toml: str) -> str:
    """Return the lines of a file that set the key."""
    section, _, last = key.name.rpartition(".")
    if key.kind in ("table", "tables"):
        value = parse_value(toml)
        tables = value if isinstance(value, list) else [value]
        head = f"[[{key.name}]]" if key.kind == "tables" else f"[{key.name}]"
        lines = []
        for table in tables:
            lines += [head, *(f"{name} = {toml_value(item)}" for name, item in table.items())]
    else:
        lines = [f"[{section}]", f"{last} = {toml}"]
    return textwrap.indent("\n".join(lines), "  ")


def _indented(text: str, indent: int = 2, first: int = 2) -> str:
    return textwrap.fill(
        text.strip(),
        _WIDTH,
        initial_indent=" " * first,
        subsequent_indent=" " * indent,
        break_on_hyphens=False,
    )


def _shipped_values(name: str) -> dict[str, Any]:
    """Return what the configs that come with the library set a key to, by their names."""
    values = {}
    for config, table in _shipped_tables().items():
        value: Any = table
        for part in name.split("."):
            value = value.get(part) if isinstance(value, dict) else None
        if value is not None:
            values[config] = value
    return values


@cache
def _shipped_tables() -> dict[str, dict[str, Any]]:
    return {name: read_toml(path) for name, path in shipped_configs().items()}


def _by_value(values: Mapping[str, Any]) -> list[str]:
    """Return a line for each value with the names of the configs that have it."""
    names: dict[str, list[str]] = {}
    for config, value in values.items():
        text = toml_value(value)
        names.setdefault(text if len(text) <= 40 else "", []).append(config)
    width = max(map(len, names))
    ordered = sorted(names.items(), key=lambda item: -len(item[1]))
    rows = (f"{value:<{width}}  {', '.join(configs)}".lstrip() for value, configs in ordered)
    return [_indented(row, width + 4 if width else 2) for row in rows]


def _related(key: Key, group: _Group) -> list[str]:
    """Return the settings that the documentation of this one names, and those that name it."""
    others = list(known_keys().values())
    siblings = {other.last_name: other.name for other in group.keys}
    named = re.findall(r"`([\w.]+)", key.doc)
    full = [siblings.get(name, name) for name in named]
    known = {*known_keys(), *siblings.values()}
    naming = [
        other.name
        for other in others
        if f"`{key.name}" in other.doc
        or (other.section == key.section and re.search(rf"`{key.last_name}\b", other.doc))
    ]
    return [name for name in dict.fromkeys([*full, *naming]) if name in known and name != key.name]
