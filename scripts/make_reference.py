"""Write the pages of docs/reference/ that list what the code has:
python scripts/make_reference.py

commands.md comes from the parser of the command line, registries.md from the registries,
exit_statuses.md from the constants, messages.md from the source (make_messages.py). settings.md is
written by make_config_docs.py, refusals.md by make_refusals.py.
"""

import argparse
import ast
import inspect
import re
import sys
import textwrap
from collections.abc import Iterator
from itertools import groupby, pairwise
from pathlib import Path
from typing import Any

sys.path.insert(0, str(Path(__file__).parent))
from make_messages import Module, Reader

from torchtitan.commands.config import reference as settings_page
from torchtitan.commands.list import _rows, lists
from torchtitan.commands.parser import CommandParser
from torchtitan.commands.table import COMMANDS, build_parser
from torchtitan.config import exit_codes
from torchtitan.config.registry import BUILT_IN

ROOT = Path(__file__).resolve().parents[1]
FOLDER = ROOT / "docs" / "reference"
MADE = "<!-- Made by scripts/make_reference.py. Do not edit. -->\n"
WIDTH = 88


def commands() -> str:
    """The page of all commands."""
    parsers = build_parser()._commands
    lines = [COMMANDS_TEXT]
    for group, names in groupby(COMMANDS, key=lambda name: COMMANDS[name].group):
        lines.append(f"## {group}\n")
        for name in names:
            lines += _command(name, parsers[name])
    return "\n".join(lines).rstrip() + "\n"


def _command(name: str, parser: CommandParser) -> Iterator[str]:
    yield f"### {name}\n"
    yield from _description(parser.description or "")
    if parser._commands:
        for action, inner in parser._commands.items():
            yield from _command(f"{name} {action}", inner)
        return
    usage = f"torchtitan {parser.usage_text().removeprefix('torchtitan ')}"
    yield _fenced(textwrap.fill(usage, WIDTH, subsequent_indent=" " * 8, break_on_hyphens=False))
    for group in parser._action_groups:
        shown = [action for action in group._group_actions if _is_shown(action)]
        if shown:
            title = TITLES.get(group.title, group.title)
            yield from _table(
                (title, ""), [(_usage_of(action), _help_of(action)) for action in shown]
            )


def _is_shown(action: argparse.Action) -> bool:
    return action.help != argparse.SUPPRESS and "--help" not in action.option_strings


def _usage_of(action: argparse.Action) -> str:
    """An option as it is written, without spellings that differ in `_` and `-` only."""
    if not action.option_strings:
        return f"`{action.metavar or action.dest}`"
    value = ""
    if action.nargs != 0:
        choices = f"{{{','.join(map(str, action.choices))}}}" if action.choices else ""
        value = str(action.metavar or choices or action.dest.upper())
        value = f" [{value}]" if action.nargs == "?" else f" {value}"
    names = {name.replace("_", "-"): name for name in reversed(action.option_strings)}
    return ", ".join(f"`{name}{value}`" for name in reversed(names.values()))


def _help_of(action: argparse.Action) -> str:
    text = (action.help or "") % {**vars(action), "prog": "torchtitan"}
    return text[:1].upper() + text[1:] + "." * (not text.endswith((".", ")"))) if text else ""


def _description(text: str) -> Iterator[str]:
    """Paragraphs as they are; blocks that are indented, and so aligned, in a fence."""
    for paragraph in inspect.cleandoc(text).split("\n\n"):
        if paragraph.startswith("  "):
            yield _fenced(textwrap.dedent(paragraph))
        else:
            sentence = paragraph[:1].upper() + paragraph[1:]
            yield sentence + "." * (not sentence.endswith((".", ":"))) + "\n"


def registries() -> str:
    """The page of all names that a config may use."""
    lines = [REGISTRIES_TEXT]
    headings = re.findall(r"^###? (\[.*)$", settings_page(), re.MULTILINE)
    for name, registry in lists().items():
        lines.append(f"## {name[:1].upper()}{name[1:]}\n")
        if registry is None:
            lines.append(CONFIGS_TEXT)
            rows = [_config_row(config, text) for config, text in _rows(name, None)]
        else:
            lines.append(
                f"For `{registry.key}`. Others come from `job.custom_import`, or from packages with"
                f" the entry point `{registry.group}` ([extending](../guides/extending.md)).\n"
            )
            own = [
                (entry, text)
                for entry, text in _rows(name, registry)
                if entry not in registry or registry.origin(entry) == BUILT_IN
            ]
            rows = [(_linked(entry, registry.key, headings), _cell(text)) for entry, text in own]
        lines += _table(("name", ""), rows)
    return "\n".join(lines).rstrip() + "\n"


def _config_row(name: str, text: str) -> tuple[str, str]:
    """Describe a shipped TOML; what a dry run counts, or how else to start it, is in the file."""
    return f"[`{name}`](../../train_configs/{name}.toml)", re.split(r"; a dry run|\. ", text)[0]


def _linked(entry: str, key: str, headings: list[str]) -> str:
    """The name, with a link to its table of settings if it has one."""
    table = "handlers" if key == "model.handlers" else key.removesuffix(".name")
    table = f"{table}.args" if key.endswith(".name") else f"{table}.{entry}"
    for heading in headings:
        section, _, names = heading.partition("] of ")
        if heading == f"[{table}]" or (section == f"[{table}" and entry in names.split(", ")):
            slug = re.sub(r"[^\w\- ]", "", heading.lower()).replace(" ", "-")
            return f"[`{entry}`](settings.md#{slug})"
    return f"`{entry}`"


def exit_statuses() -> str:
    """The page of exit statuses."""
    body = ast.parse(inspect.getsource(exit_codes)).body
    docs = {
        node.targets[0].id: inspect.cleandoc(doc.value.value)
        for node, doc in pairwise(body)
        if isinstance(node, ast.Assign)
        and isinstance(node.targets[0], ast.Name)
        and isinstance(node.value, ast.Constant)
        and isinstance(doc, ast.Expr)
        and isinstance(doc.value, ast.Constant)
    }
    rows = []
    for name, doc in docs.items():
        status = getattr(exit_codes, name)
        errors = [kind.__name__ for kind, code in exit_codes._BY_ERROR.items() if code == status]
        text = " ".join(doc.split())
        rows.append((str(status), text, ", ".join(f"`{error}`" for error in errors)))
    return "\n".join([EXIT_TEXT, *_table(("status", "meaning", "error in Python"), rows)])


def messages() -> str:
    """The page of messages."""
    reader, lines = Reader(ROOT / "torchtitan"), [MESSAGES_TEXT]
    rooms: dict[str, list[Module]] = {}
    for name, module in reader.modules.items():
        if name not in NOT_MESSAGES:
            rooms.setdefault(".".join(name.split(".")[:2]), []).append(module)
    for room, modules in rooms.items():
        found = {module.name: reader.messages(module) for module in modules}
        if any(found.values()):
            doc = reader.modules[room].doc if room in reader.modules else ""
            lines.append(f"## {room.rpartition('.')[2]}\n\n{doc}\n")
        for name, messages in found.items():
            if messages and name != room:
                lines.append(f"### {name.partition('.')[2]}\n\n{reader.modules[name].doc}\n")
            if messages:
                rows = [(f"{m.kind}{_plain(m.text)}", _plain(m.fix)) for m in messages]
                lines += _table(("message", "what to do"), rows)
    return "\n".join(lines).rstrip() + "\n"


def _plain(text: str) -> str:
    """Text as Markdown shows it; what is in backticks is code already."""
    parts = _cell(text).split("`")
    if len(parts) % 2 == 0:
        parts = ["'".join(parts)]
    parts[::2] = [re.sub(ESCAPED, r"\\\1", part) for part in parts[::2]]
    return "`".join(parts).strip()


def _table(head: tuple[str, ...], rows: list[tuple[str, ...]]) -> list[str]:
    lines = [head, ("---",) * len(head), *rows]
    return [*(f"| {' | '.join(line)} |" for line in lines), ""]


def _cell(text: str) -> str:
    return text.replace("|", "\\|")


def _fenced(text: str) -> str:
    return f"```text\n{text}\n```\n"


NOT_MESSAGES = ("torchtitan.config.reference", "torchtitan.weights.model_card")
"""Modules that make pages."""
ESCAPED = r"([*<>\[\]#\\](?!\|)|(?<![A-Za-z0-9])_|_(?![A-Za-z0-9]))"
TITLES: dict[Any, str] = {"positional arguments": "arguments", None: "options"}
COMMANDS_TEXT = f"""# Commands

{MADE}
`torchtitan COMMAND --help` prints the same. Commands that take `--section.key value` read a config
first; [settings](settings.md) has every key, and [exit statuses](exit_statuses.md) how a command
ends. `-` and `_` are the same in an option.
"""
REGISTRIES_TEXT = f"""# Names

{MADE}
Every name that a config may use, as `torchtitan list` prints it. Names that installed packages and
your own modules add are printed too, with their origin.
"""
CONFIGS_TEXT = """TOMLs to start from: `torchtitan train NAME`, or, for a copy to edit,
`torchtitan config copy NAME FILE`. The comment at the top of each says how to start it.
"""
EXIT_TEXT = f"""# Exit statuses

{MADE}
torchrun turns every status but 0 into 1. So a scheduler reads `run_status.json` in the run folder:
`exit_code` as here, `status` in a word, `error` in a line, and `requeue`, which is true if
the same command may well go on by itself
([launching](../guides/launching.md#stopping-and-starting-again)).
"""
MESSAGES_TEXT = f"""# Messages

{MADE}
Every message that the library can print, by the module that prints it, with what to do about it.
Look for a part of yours without names and numbers: they are `…` here. An error about a setting
begins with its key, and ends with `Fix:` and what is in the last column. What ends a run, and
with which status, is in [exit statuses](exit_statuses.md); which settings do not go together, in
[refusals](refusals.md).
"""
PAGES = {
    "commands.md": commands,
    "registries.md": registries,
    "exit_statuses.md": exit_statuses,
    "messages.md": messages,
}


if __name__ == "__main__":
    for name, make in PAGES.items():
        (FOLDER / name).write_text(make(), encoding="utf-8")
        print(f"wrote {FOLDER / name}")
