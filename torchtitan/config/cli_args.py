"""The command line as config values: `--section.key value` in every spelling people use.

argparse reads the options of a command; it cannot read settings, because it stops at the first
error and takes neither `--x true` nor lists with commas. This pass reads all of them against the
table of keys and collects every problem. The sections check the values.
"""

import os
import re
import shlex
from collections.abc import Mapping, Sequence
from dataclasses import dataclass, field
from typing import Any

from torchtitan.config import toml_file
from torchtitan.config.compat.keys import NONE_MEANS
from torchtitan.config.compat.translate import old_key
from torchtitan.config.errors import ConfigIssue
from torchtitan.config.fields import Key, free_table_of, known_keys, known_sections
from torchtitan.config.keys_check import meant_keys, secret_issue, unknown_key
from torchtitan.config.toml_text import toml_value
from torchtitan.utils.redaction import holds_a_secret, is_secret

_BOOLEANS = {"true": True, "false": False}
_NOT_BOOLEANS = ("yes", "no", "on", "off", "0", "1", "none")
"""After a switch, these are its (invalid) value rather than the next argument."""
_INTEGER = re.compile(r"[+-]?\d(_?\d)*")
_HELP = "`torchtitan train --help all` lists them"


@dataclass
class CommandLine:
    """Values by dotted key (`model.args.n_layers`), in order, and what could not be read.

    The last value of a repeated key counts, with a notice.
    """

    values: dict[str, Any] = field(default_factory=dict)
    problems: list[ConfigIssue] = field(default_factory=list)
    notices: list[str] = field(default_factory=list)


def parse_command_line(argv: Sequence[str]) -> CommandLine:
    """Read the settings of a command line. A bare argument is the config file."""
    parsed = CommandLine()
    rest = list(argv)
    while rest:
        argument = rest.pop(0)
        if argument.startswith("--") and len(argument) > 2:
            _take_flag(argument, rest, parsed)
        elif argument.startswith("-"):
            problem = ConfigIssue(argument, "is not a flag", f"flags are `--section.key`; {_HELP}")
            parsed.problems.append(problem)
        else:
            _take_file(argument, parsed)
    return parsed


def read_settings(settings: Mapping[str, Any]) -> CommandLine:
    """Read settings by dotted key (`training.steps`), or in tables, with values of Python."""
    parsed = CommandLine()
    _take_table(settings, "", parsed)
    return parsed


def _take_table(table: Mapping[str, Any], prefix: str, parsed: CommandLine) -> None:
    for key, value in table.items():
        name = f"{prefix}{key}"
        if isinstance(value, os.PathLike):
            value = os.fspath(value)
        if _find(name) is not None or free_table_of(name):
            _set(parsed, name, value, name)
        elif name in known_sections() and isinstance(value, Mapping):
            _take_table(value, f"{name}.", parsed)
        else:
            parsed.problems.append(unknown_key(name, name, value=value))


def _take_file(argument: str, parsed: CommandLine) -> None:
    name, is_setting, value = argument.partition("=")
    if is_setting and not os.path.exists(argument):  # torchtune's form
        known = _find(name) is not None or free_table_of(name)
        if meant := [name] if known else meant_keys(name):
            fix = f"write `--{meant[0]} {shlex.quote(value)}`"
            issue = ConfigIssue(name, "needs dashes", fix)
            parsed.problems.append(secret_issue(name) if is_secret(name, value) else issue)
            return
    first = parsed.values.get("job.config_file", argument)
    if first == argument or holds_a_secret(argument):
        _set(parsed, "job.config_file", argument, argument)
        return
    fix = "leave one out; single settings follow as `--section.key value`"
    if "." not in argument or "." not in first:  # perhaps the value of a flag
        fix += "; checks are `--check` or `--check full`"
    problem = f"is a second config file besides {first}"
    parsed.problems.append(ConfigIssue(argument, problem, fix))


def _take_flag(argument: str, rest: list[str], parsed: CommandLine) -> None:
    flag, equals, inline = argument.partition("=")
    name = _normalise(flag)
    if free_table_of(name):
        _take_free(flag, name, bool(equals), inline, rest, parsed)
        return
    key = _find(name)
    if name in ("config", "config_file"):
        file = inline if equals else "".join(_values_ahead(rest, many=False)) or "FILE"
        fix = f"write the file alone, such as `torchtitan train {shlex.quote(file)}`"
        parsed.problems.append(ConfigIssue(flag, "is not needed", fix))
        return
    if key is None:
        key = _negated(name)
        if key is None:
            value = _free_value(inline if equals else "".join(rest[:1]))
            parsed.problems.append(unknown_key(flag, name, dashes="--", value=value))
            if not equals:
                _skip_values(rest)
        elif equals:
            problem = ConfigIssue(flag, "takes no value", f"write `--{key.name} {inline}`", inline)
            parsed.problems.append(problem)
        else:
            _set(parsed, key.name, False, flag)
        return
    if equals:
        texts = [inline]
    elif key.kind == "bool":
        follows = bool(rest) and rest[0].lower() in (*_BOOLEANS, *_NOT_BOOLEANS)
        texts = [rest.pop(0)] if follows else ["true"]
    else:
        texts = _values_ahead(rest, many=key.kind == "strings")
    if not texts or texts == [""]:
        parsed.problems.append(ConfigIssue(flag, "has no value", _how_to_write(key)))
        return
    _convert_and_set(parsed, key, texts, flag)


def _convert_and_set(parsed: CommandLine, key: Key, texts: list[str], flag: str) -> None:
    if texts == ["None"] and key.name in NONE_MEANS:
        _set(parsed, key.name, NONE_MEANS[key.name], flag)
    elif key.kind in ("table", "tables", "lists") or (
        key.kind == "strings" and texts[0].startswith("[")
    ):
        text = " ".join(texts)
        try:
            value = toml_file.parse_value(text)
        except ValueError:
            problem = ConfigIssue(flag, "is not TOML", _how_to_write(key), text)
            parsed.problems.append(secret_issue(flag) if holds_a_secret(text) else problem)
            return
        _set(parsed, key.name, value, flag)
    elif key.kind == "strings":
        names = [name for text in texts for name in text.split(",")]
        _set(parsed, key.name, [name.strip() for name in names if name.strip()], flag)
    else:
        _set(parsed, key.name, _scalar(key, texts[0]), flag)


def _scalar(key: Key, text: str) -> Any:
    """Return the typed value; text of the wrong type stays text, which the section rejects."""
    if key.optional and text == "None":
        return None
    if key.kind == "bool":
        return _BOOLEANS.get(text.lower(), text)
    try:
        if key.kind == "int" and _INTEGER.fullmatch(text):
            return int(text)
        return float(text) if key.kind == "float" else text
    except ValueError:  # not a number, or one too long for Python
        return text


def _take_free(
    flag: str, name: str, has_inline: bool, inline: str, rest: list[str], parsed: CommandLine
) -> None:
    """Take a key of unknown type, below `model.args` or `handlers`: a TOML value or text."""
    texts = [inline] if has_inline else _values_ahead(rest, many=False)
    if not texts or texts == [""]:
        fix = f"write `{flag} VALUE`, with a TOML value such as 4, true or [1, 2]"
        parsed.problems.append(ConfigIssue(flag, "has no value", fix))
        return
    value = _free_value(texts[0])
    if value == texts[0] and value.startswith("[") and not holds_a_secret(value):
        # The shell removed the quotes.
        fix = f"""write it as in TOML and quote it for the shell: `{flag} '["a", "b"]'`"""
        parsed.problems.append(ConfigIssue(flag, "is not TOML", fix, value))
        return
    _set(parsed, name, value, flag)


def _free_value(text: str) -> Any:
    """Read TOML; text that is not TOML stays text."""
    try:
        return toml_file.parse_value(text)
    except ValueError:
        return text


def _set(parsed: CommandLine, name: str, value: Any, flag: str) -> None:
    """Record a value. A table is recorded key by key, so that it adds to other flags."""
    is_free = free_table_of(f"{name}.") is not None
    if is_free and isinstance(value, dict) and value and not any("." in key for key in value):
        for key, inner in value.items():
            _set(parsed, f"{name}.{key}", inner, flag)
        return
    if is_secret(name, value):
        parsed.problems.append(secret_issue(flag))
        return
    before = parsed.values.pop(name, value)  # the order is that of the last occurrences
    if before != value:
        given = f"{toml_value(before)} and {toml_value(value)}"
        dashes = "--" if flag.startswith("-") else ""
        parsed.notices.append(f"{dashes}{name} is given twice ({given}): the last one counts")
    parsed.values[name] = value


def _find(name: str) -> Key | None:
    """Return the key of this name, today's or an older release's."""
    return known_keys().get(name) or old_key(name)


def _normalise(flag: str) -> str:
    return flag.removeprefix("--").replace("-", "_")


def _negated(name: str) -> Key | None:
    """Return the boolean key that `--no-section.key` or `--section.no-key` switches off."""
    section, _, last = name.rpartition(".")
    for positive in (
        name.removeprefix("no_"),
        f"{section}.{last.removeprefix('no_')}",
    ):
        key = _find(positive)
        if positive != name and key is not None and key.kind == "bool":
            return key
    return None


def _values_ahead(rest: list[str], many: bool) -> list[str]:
    values: list[str] = []
    while rest and not rest[0].startswith("--") and (many or not values):
        values.append(rest.pop(0))
    return values


def _skip_values(rest: list[str]) -> None:
    """Drop the value of an unknown flag, so that one typo is one problem."""
    if rest and not rest[0].startswith("--"):
        rest.pop(0)


def _how_to_write(key: Key) -> str:
    is_text = key.kind in ("str", "choice")
    example = key.example.strip('"') if is_text else shlex.quote(key.example)
    return f"write `--{key.name} {example}`" + (", or [] for none" if key.kind == "strings" else "")
