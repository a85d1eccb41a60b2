"""Expand `~` and `$VARIABLES` in settings that are paths, once for all keys."""

import os
import re
from typing import Annotated, NamedTuple

from pydantic import AfterValidator

_VARIABLE = re.compile(r"\$(\w+|\{[^}]*\})", re.ASCII)


class _PathMark(NamedTuple):
    """The mark of a field that is a path, by which checks and messages find it."""


IS_PATH = _PathMark()


def expand_path(text: str) -> str:
    """Return the path with `$NAME`, `${NAME}` and a leading `~` or `~user` expanded.

    A name that is not set stays as it is; see `why_unexpanded`.
    """
    return os.path.expanduser(os.path.expandvars(text))


def why_unexpanded(text: str) -> str | None:
    """Return what `expand_path` left unexpanded, in words; None if nothing."""
    variable = _VARIABLE.search(text)
    if variable:
        return f"the environment has no variable {variable[1].strip('{}')}"
    if text.startswith("~"):
        return f"there is no home folder of {text[1:].partition('/')[0] or 'this user'}"
    return None


PathText = Annotated[str, AfterValidator(expand_path), IS_PATH]
"""A path in a config: a relative one starts where the process does."""


def hub_hint(given: str) -> str:
    """Return the question whether an absent path is a model of the hub; "" if it is none's name."""
    owner = given.partition("/")[0]
    if not re.fullmatch(r"\w[\w.-]*/[\w.-]+", given, re.ASCII) or os.path.isdir(owner):
        return ""
    return f"did you mean hf://{given}? Otherwise "
