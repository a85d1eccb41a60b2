"""The place of the base that a checkpoint refers to, and a check of its content. No torch."""

import re
from collections.abc import Mapping
from pathlib import Path
from typing import NamedTuple

from torchtitan.config import CheckpointError, ConfigError, ConfigIssue
from torchtitan.config.paths import expand_path
from torchtitan.utils.remote import is_remote

_OPTION = "--base"
_RECORDED = re.compile(r"(hf|s3|gs|az)://")
"""The stores that a checkpoint may let this machine open: whoever made it is not trusted."""


class MovedBase(NamedTuple):
    """The setting that says where a base is now, if there is one, and its value."""

    key: str | None = None
    path: str | None = None


NOT_MOVED = MovedBase()


def moved_base(given: str | None) -> MovedBase:
    """Return the base that a command's `--base` names. Raises ConfigError if it does not exist."""
    if given is None:
        return MovedBase(_OPTION)
    path = expand_path(given)
    if not is_remote(path) and not Path(path).exists():
        fix = "name the base model's folder or file"
        raise ConfigError(ConfigIssue(_OPTION, "does not exist", fix, given))
    return MovedBase(_OPTION, path)


def place_of_base(recorded: Mapping[str, str], moved: MovedBase) -> str | None:
    """Return where the base is: a path that exists, or a repository of the hub; None if it is gone.

    Content decides whether it is the right one, so what is here goes before a download.
    """
    url = recorded.get("hub", "")
    places = [place for place in (moved.path, recorded["path"]) if place is not None]
    here = [place for place in places if not is_remote(place) and Path(place).exists()]
    remote = [url] if _RECORDED.match(url) else []
    remote += [moved.path] if moved.path is not None and is_remote(moved.path) else []
    return next(iter([*here, *remote]), None)


def missing_base(recorded: Mapping[str, str], moved: MovedBase) -> CheckpointError:
    """Return the error for a base that is gone."""
    return CheckpointError(
        f"the base model {recorded['path']}, which the checkpoint refers to, does not exist."
        f" Fix: restore it{_or_say_where('it', moved)}"
    )


def require_same_base(
    recorded: Mapping[str, str], path: Path, digest: str, moved: MovedBase
) -> None:
    """Raise `CheckpointError` unless the base at `path` is the recorded one."""
    if recorded["digest"] != digest:
        place = "" if str(path) == recorded["path"] else f" (it was {recorded['path']})"
        raise CheckpointError(
            f"the base model {path}{place} is not the one that the checkpoint was trained on: its"
            f" content differs. Fix: restore it{_or_say_where('the unchanged base', moved)}"
        )


def _or_say_where(base: str, moved: MovedBase) -> str:
    return "" if moved.key is None else f", or set {moved.key} to where {base} is now"
