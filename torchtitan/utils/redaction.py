"""Recognise secrets, and keep them out of everything that is printed or stored."""

import re
from collections.abc import Mapping
from typing import Any

_SECRET_WORDS = frozenset(
    ["token", "secret", "password", "passwd", "passwort", "apikey", "credential", "credentials"]
)
_SECRET_PAIRS = re.compile(r"(api|access|private|auth|ssh)_key$")
_SECRET_VALUE = re.compile(
    r"hf_[A-Za-z0-9]{16,}"
    r"|sk-[A-Za-z0-9_-]{20,}"
    r"|gh[pousr]_[A-Za-z0-9]{20,}"
    r"|github_pat_[A-Za-z0-9_]{20,}"
    r"|AKIA[A-Z0-9]{16}"
    r"|xox[abprs]-[A-Za-z0-9-]{10,}"
    r"|(?<=://)[^/\s:@]+:[^/\s:@]+(?=@)"
)
_ASSIGNMENT = re.compile(
    r"""(?ix)
    ( [\w-]* (?: token | secret | passw | credential | (?:api|access|private|auth)[_-]?key )
      (?!izer) [\w-]* ["']? \s* [=:\s] \s* )
    ( "[^"]*" | '[^']*' | [^\s,}]+ )"""
)
HIDDEN = "<hidden>"


def names_a_secret(key: str, value: Any = "") -> bool:
    """Return whether a key, such as `hf_token`, is called like a secret and its value holds text.

    Numbers and booleans, as of `token_weight`, are no secrets.
    """
    if not _holds_text(value):
        return False
    name = key.rsplit(".", 1)[-1].replace("-", "_").lower()
    words = set(name.split("_"))
    return bool(words & _SECRET_WORDS) or bool(_SECRET_PAIRS.search(name))


def holds_a_secret(text: str) -> bool:
    """Return whether a value has the shape of a token, or is a URL with a password."""
    return bool(_SECRET_VALUE.search(text))


def is_secret(key: str, value: Any) -> bool:
    """Return whether a setting, or anything in its tables and lists, looks like a secret."""
    if names_a_secret(key, value):
        return True
    if isinstance(value, Mapping):
        return any(is_secret(str(name), item) for name, item in value.items())
    if isinstance(value, list | tuple):
        return any(is_secret("", item) for item in value)
    return isinstance(value, str) and holds_a_secret(value)


def _holds_text(value: Any) -> bool:
    if isinstance(value, Mapping):
        return any(map(_holds_text, value.values()))
    if isinstance(value, list | tuple):
        return any(map(_holds_text, value))
    return not isinstance(value, bool | int | float | None)


def redact_tree(value: Any) -> Any:
    """Return a copy of nested tables and lists with everything that looks like a secret hidden."""
    if isinstance(value, Mapping):
        return {
            key: HIDDEN if names_a_secret(str(key), item) else redact_tree(item)
            for key, item in value.items()
        }
    if isinstance(value, list | tuple):
        return [redact_tree(item) for item in value]
    return redact(value) if isinstance(value, str) else value


def without_secrets(text: str) -> str:
    """Return `text` with values of the shape of a known kind of token hidden."""
    return _SECRET_VALUE.sub(HIDDEN, text)


def redact(text: str) -> str:
    """Return `text` with tokens, and values assigned to secret-looking names, hidden."""
    return _ASSIGNMENT.sub(lambda match: match.group(1) + HIDDEN, without_secrets(text))
