"""Read a TOML together with the files that it is based on.

Two keys stand above the first section. `base` names the file whose settings this one starts from: a
config that comes with the library, or a path, which starts in the folder of the file that names it.
`unset` lists settings of the base that this file leaves out, since TOML has no null.
"""

import glob
import os
from collections.abc import Sequence
from dataclasses import dataclass, replace
from pathlib import Path
from typing import Any

from torchtitan.config.compat.keys import TODAY
from torchtitan.config.errors import ConfigError, ConfigIssue
from torchtitan.config.fields import (
    BASE,
    TOP_KEYS,
    UNSET,
    free_table_of,
    known_keys,
    known_sections,
)
from torchtitan.config.keys_check import secret_issue, unknown_key
from torchtitan.config.paths import expand_path, why_unexpanded
from torchtitan.config.shipped import base_path, shipped_configs
from torchtitan.config.suggest import nearest
from torchtitan.config.toml_file import read_toml
from torchtitan.utils.redaction import holds_a_secret


@dataclass(frozen=True)
class TomlFile:
    """One file of a chain: its path, and its sections without `base` and `unset`."""

    path: Path
    table: dict[str, Any]
    base: str | None = None
    """As written."""
    unset: tuple[str, ...] = ()


def read_files(path: Path) -> tuple[list[TomlFile], list[ConfigIssue]]:
    """Return a TOML, last, after the files that it is based on, and what is wrong with these.

    The files behind a base that is wrong are missing.
    """
    files: list[TomlFile] = []
    issues: list[ConfigIssue] = []
    following: Path | None = path
    while following is not None:
        try:
            table = read_toml(following)
        except ConfigError as error:
            why = f" (base of {files[-1].path})" if files else ""
            issues += [replace(issue, key=issue.key + why) for issue in error.problems]
            break
        base, unset = table.pop(BASE, None), table.pop(UNSET, None)
        names, found = _unset_names(following, base, unset)
        files.append(TomlFile(following, table, base if isinstance(base, str) else None, names))
        issues += found
        try:
            following = None if base is None else _path_of_base(files, base)
        except ConfigError as error:
            issues += error.problems
            break
    return files[::-1], issues


def _path_of_base(files: Sequence[TomlFile], base: Any) -> Path:
    """Return the file that the last of `files` names as its base. Raises ConfigError."""
    file = files[-1].path
    key = f"{file}: {BASE}"
    if not isinstance(base, str) or not base:
        problem = "needs the name of one config that comes with the library, or one path"
        fix = f"write for example `{TOP_KEYS[BASE].example}`; that file may have a base of its own"
        value = str(base) if isinstance(base, dict) else base
        raise ConfigError(ConfigIssue(key, problem, fix, value))
    if holds_a_secret(base):
        raise ConfigError(secret_issue(key))
    reason = why_unexpanded(expand_path(base))
    if reason:
        fix = "set it where the run starts, or write the path itself"
        raise ConfigError(ConfigIssue(key, reason, fix, base))
    path = base_path(base, file.parent)
    if os.path.isdir(path):  # Path.is_dir raises for a name that is too long
        config = Path(base) / "config.toml"
        fix = f'did you mean "{config}"?' if (path / config.name).is_file() else "name a TOML file"
        raise ConfigError(ConfigIssue(key, "is a folder", fix, base))
    if not os.path.exists(path):
        problem = f"is no config of the library, and {path.absolute()} does not exist"
        raise ConfigError(ConfigIssue(key, problem, _fix_of_absent(base, path), base))
    chain = [one.path for one in files]
    if any(os.path.samefile(path, one) for one in chain):
        text = " -> ".join(map(str, [*chain, path]))
        fix = "take `base` out of one of these files"
        raise ConfigError(ConfigIssue(key, f"leads round in a circle: {text}", fix, base))
    return path


def _fix_of_absent(base: str, path: Path) -> str:
    folder = path.parent
    besides = [Path(name).name for name in glob.glob(f"{glob.escape(str(folder))}/*.toml")]
    suffixed = f"{path.name}.toml"
    near = suffixed if suffixed in besides else nearest(path.name, besides)
    name = nearest(path.stem, shipped_configs())
    if near:
        meant = str(Path(base).with_name(near))
    elif os.path.isfile(expand_path(base)):  # the path starts in the current folder
        meant = os.path.relpath(expand_path(base), folder)
    else:
        meant = name or ""
    fix = "a relative path starts in the folder of the file that names it"
    return f'did you mean "{meant}"? Note that {fix}' if meant else f"check the path: {fix}"


def _unset_names(file: Path, base: Any, names: Any) -> tuple[tuple[str, ...], list[ConfigIssue]]:
    """Return the names that `unset` lists and a config can hold, and what is wrong with it."""
    key = f"{file}: {UNSET}"
    if names is None:
        return (), []
    if not isinstance(names, list) or not all(isinstance(name, str) for name in names):
        fix = f"write for example `{TOP_KEYS[UNSET].example}` above the first section"
        value = str(names) if isinstance(names, dict) else names
        return (), [ConfigIssue(key, "needs a list of names", fix, value)]
    if base is None:
        fix = f"leave it out, or name the file that sets them, as in `{TOP_KEYS[BASE].example}`"
        return (), [ConfigIssue(key, "leaves out what a base sets, and there is none", fix, names)]
    known = [
        name
        for name in names
        if name in known_keys() or name in known_sections() or free_table_of(name)
    ]
    wrong = [_unknown_name(name) for name in names if name not in known]
    return tuple(known), [replace(issue, key=f"{key}: {issue.key}") for issue in wrong]


def _unknown_name(name: str) -> ConfigIssue:
    if name in TODAY:
        return ConfigIssue(name, f"is {TODAY[name]} today", "write that name")
    return unknown_key(name, name)
