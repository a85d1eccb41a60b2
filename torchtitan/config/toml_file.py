"""Read a TOML file, with errors that say where."""

import codecs
import os
import stat
import sys
from pathlib import Path
from typing import Any

from torchtitan.config.errors import ConfigError, ConfigIssue
from torchtitan.config.shipped import found_elsewhere, shipped_configs
from torchtitan.config.suggest import nearest
from torchtitan.utils.redaction import redact

if sys.version_info >= (3, 11):
    import tomllib
else:
    import tomli as tomllib

MAX_BYTES = 1_000_000
_YAML = "a YAML file, as of torchtune: docs/start/from_torchtune.md shows its TOML"


def read_toml(path: Path) -> dict[str, Any]:
    """Return the file as a dict.

    Raises:
        ConfigError: with the absolute path and, if known, line and column.
    """
    key = str(path.absolute())
    text = _read_text(path, key)
    try:
        return tomllib.loads(text)
    except tomllib.TOMLDecodeError as error:
        line, column = _position(text, error)
        source = text.splitlines()[line - 1] if line <= len(text.splitlines()) else ""
        message = str(error).split(" (at ")[0]
        message = f"is not valid TOML: {message[:1].lower()}{message[1:]}{_excerpt(source, column)}"
        is_yaml = path.suffix in (".yaml", ".yml") or "_component_" in text
        fix = _YAML if is_yaml else _syntax_hint(message)
        raise ConfigError(ConfigIssue(f"{key}:{line}:{column}", message, fix)) from None
    except RecursionError:
        raise ConfigError(ConfigIssue(key, "is nested too deeply", "flatten the tables")) from None
    except ValueError:  # Python's, of thousands of digits
        fix = "write a smaller number"
        raise ConfigError(ConfigIssue(key, "holds a number that is too long", fix)) from None


def parse_value(text: str) -> Any:
    """Return one TOML value, such as `4`, `true` or `[1, 2]`; raise ValueError if it is none."""
    if "\n" in text or "#" in text:
        raise ValueError(text)
    return tomllib.loads(f"value = {text}")["value"]


def _read_text(path: Path, key: str) -> str:
    try:
        data = read_regular_file(path, MAX_BYTES + 1)
    except IsADirectoryError:
        raise ConfigError(ConfigIssue(key, "is a folder", "name a TOML file")) from None
    except FileNotFoundError:
        raise ConfigError(ConfigIssue(key, "does not exist", _fix_of_absent(path))) from None
    except NotARegularFileError:
        fix = "write it to a file, which all processes can read"
        raise ConfigError(ConfigIssue(key, "is not a regular file", fix)) from None
    except (OSError, ValueError) as error:
        reason = getattr(error, "strerror", None) or str(error)
        raise ConfigError(
            ConfigIssue(key, f"cannot be read: {reason}", "make it readable")
        ) from None
    if len(data) > MAX_BYTES:
        fix = "this is hardly a config: name another file"
        raise ConfigError(ConfigIssue(key, "is larger than 1 MB", fix))
    data = data.removeprefix(codecs.BOM_UTF8)  # which some editors write
    if b"\0" in data:
        place = f"{key}:{_line_column(data, data.index(0))}"
        fix = "save it as UTF-8 text (a UTF-16 file looks like this)"
        raise ConfigError(ConfigIssue(place, "contains a NUL byte", fix))
    try:
        return data.decode()
    except UnicodeDecodeError as error:
        place = f"{key}:{_line_column(data, error.start)}"
        problem = f"is not UTF-8: byte 0x{data[error.start]:02x}"
        raise ConfigError(ConfigIssue(place, problem, "save it as UTF-8 text")) from None


def _fix_of_absent(path: Path) -> str:
    elsewhere = found_elsewhere(str(path))
    if elsewhere:
        return f"did you mean {elsewhere}? A relative path starts in the current folder"
    fix = f"check the path; the current folder is {Path.cwd()}"
    is_word = path.name == str(path)
    name = path.stem if path.stem in shipped_configs() else None
    name = nearest(path.stem, shipped_configs()) if is_word else name
    if name:
        fix = f"did you mean `{name}`, which comes with the library? Otherwise {fix}"
    elif is_word:
        fix += "; `torchtitan list configs` prints the names of shipped ones"
    if path.name in ("check", "full"):
        fix += ". A bare word is the config file; checks are `--check` or `--check full`"
    return fix


def _position(text: str, error: Exception) -> tuple[int, int]:
    """Return line and column, from 1: attributes of newer parsers, text of older ones."""
    line, column = getattr(error, "lineno", None), getattr(error, "colno", None)
    if line is not None and column is not None:
        return line, column
    words = str(error).rpartition("(at line ")[2].rstrip(")").split(", column ")
    if len(words) == 2 and words[0].isdigit() and words[1].isdigit():
        return int(words[0]), int(words[1])
    lines = text.splitlines() or [""]
    return len(lines), len(lines[-1]) + 1


def _line_column(data: bytes, offset: int) -> str:
    line_start = data.rfind(b"\n", 0, offset) + 1
    line = data.count(b"\n", 0, offset) + 1
    return f"{line}:{offset - line_start + 1}"


def _excerpt(source: str, column: int) -> str:
    shown = redact(source)
    if not shown.strip() or len(shown) > 200:
        return ""
    marker = "" if shown != source else f"\n    {' ' * (column - 1)}^"
    return f"\n    {shown}{marker}\n  "


def _syntax_hint(message: str) -> str:
    if "overwrite" in message or "declare" in message.lower() or "duplicate" in message.lower():
        return "keep one of the two"
    return "correct the line; strings need quotes, booleans are true and false"


class NotARegularFileError(OSError):
    """A pipe, a device or a socket: reading it may take for ever, and works once."""


def read_regular_file(path: Path, max_bytes: int) -> bytes:
    """Return at most the first `max_bytes` of a file, without waiting for a pipe.

    Raises:
        IsADirectoryError: it is a folder.
        NotARegularFileError: it is a pipe, a device or a socket.
        OSError: it cannot be read.
    """
    descriptor = os.open(path, os.O_RDONLY | os.O_NONBLOCK | os.O_CLOEXEC)
    with open(descriptor, "rb") as file:
        kind = os.fstat(descriptor).st_mode
        if stat.S_ISDIR(kind):
            raise IsADirectoryError(f"{path} is a folder")
        if not stat.S_ISREG(kind):
            raise NotARegularFileError(f"{path} is not a regular file")
        return file.read(max_bytes)
