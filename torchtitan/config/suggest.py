"""Suggestions for names that nobody knows."""

import difflib
from collections.abc import Iterable, Sequence
from typing import Any

from torchtitan.config.compat.keys import MISNAMED, OLD_KEYS
from torchtitan.config.compat.translate import today_name
from torchtitan.config.errors import ConfigIssue
from torchtitan.config.fields import known_keys, known_sections
from torchtitan.utils.redaction import names_a_secret

_SPECIAL_FLAGS = ("check", "help")


def nearest(name: str, candidates: Iterable[str]) -> str | None:
    """Return the candidate most like `name`, whatever the case, or None."""
    by_lower = {candidate.lower(): candidate for candidate in candidates}
    matches = difflib.get_close_matches(name.lower(), by_lower, n=1, cutoff=0.65)
    return by_lower[matches[0]] if matches else None


def did_you_mean(name: str, candidates: Iterable[str]) -> str:
    """Return the fix for a name that is none of the candidates."""
    candidates = list(candidates)
    match = nearest(name, candidates)
    choices = f"choose from {', '.join(candidates)}" if candidates else "there is none to choose"
    return f'did you mean "{match}"? Otherwise {choices}' if match else choices


def fix_of_registered(name: str, known: Iterable[str]) -> str:
    """Return the fix for a name that is not registered."""
    return f"{did_you_mean(name, known)}; for one of your own, name its module in job.custom_import"


def issues_of_names(
    kind: str, key: str, chosen: Sequence[str], tables: Iterable[str], known: Iterable[str]
) -> list[ConfigIssue]:
    """Check names in the list `key`, and tables `[KINDs.NAME]`, against the registered ones."""
    issues, known = [], list(known)
    for place, name in enumerate(chosen):
        if name not in known:
            fix = fix_of_registered(name, known)
            issues.append(ConfigIssue(key, f"is not a {kind}", fix, value=name))
        elif name in chosen[:place]:
            issues.append(ConfigIssue(key, "is listed twice", "list it once", value=name))
    for name in tables:
        if name not in known and name not in chosen:
            fix = fix_of_registered(name, known)
            issues.append(ConfigIssue(f"{kind}s.{name}", f"is not a {kind}", fix))
    return issues


def fix_of_glob(glob: str, names: Iterable[str]) -> str:
    """Return the fix for a glob that matches no name of a parameter."""
    names = list(names)
    parts = [name.split(".") for name in names]
    modules = {".".join(part[:n]) + ".*" for part in parts for n in range(1, len(part))}
    match = nearest(glob, [*names, *sorted(modules)])
    kinds = {".".join(part[-2:]): ".".join(part) for part in reversed(parts)}
    examples = ", ".join(list(reversed(kinds.values()))[:4])
    prefix = f'did you mean "{match}"? ' if match else ""
    return f"{prefix}Use a glob over full names such as {examples}, or leave it out"


def secret_problem(key: str) -> ConfigIssue:
    """Return the issue of a token in the config."""
    return ConfigIssue(
        key,
        "looks like a secret; configs are stored with the run and command lines are public",
        "remove it here, and set HF_TOKEN (or the service's own variable) in the environment",
    )


def unknown_key(
    shown: str, name: str, *, from_command_line: bool = False, value: Any = ""
) -> ConfigIssue:
    """Return the issue of a dotted key that no section has; `shown` is how the user wrote it."""
    if names_a_secret(name, value):
        return secret_problem(shown)
    dashes = "--" if from_command_line else ""
    section, _, last = name.rpartition(".")
    homes = [key for key in known_keys().values() if key.last_name == last]
    if name in MISNAMED:
        return ConfigIssue(shown, "has another name here", f"write `{dashes}{MISNAMED[name]}`")
    if homes:
        places = " or ".join(f"`{dashes}{key.name}`" for key in homes)
        belongs = " or ".join(f"[{key.section}]" for key in homes)
        return ConfigIssue(shown, f"belongs in section {belongs}", f"write {places}")
    if from_command_line and name in known_sections():
        fix = f"write `--{name}.KEY`; keys: {', '.join(_keys_in(name))}"
        return ConfigIssue(shown, "is a section, not a setting", fix)
    names = [*known_keys(), *OLD_KEYS]
    siblings = {n.rpartition(".")[2]: n for n in names if n.rpartition(".")[0] == section}
    if siblings and section:
        match = siblings.get(nearest(last, siblings) or "")
    else:
        match = nearest(name, [*names, *_SPECIAL_FLAGS] if from_command_line else names)
    hint = f"did you mean `{dashes}{today_name(match)}`? " if match else ""
    if section not in known_sections():
        return ConfigIssue(shown, "is unknown", f"{hint}The sections are {_sections()}")
    keys = _keys_in(section)
    fix = f"{hint}Keys of [{section}]: {', '.join(keys)}"
    if "args" in keys:
        fix += f"; what {section}.name chooses has its own settings in [{section}.args]"
    return ConfigIssue(shown, "is unknown", fix)


def unknown_section(name: str) -> ConfigIssue:
    """Return the issue of a table, or of a key at the top level, that is not a section."""
    if names_a_secret(name):
        return secret_problem(name)
    match = nearest(name, known_sections())
    hint = f"did you mean [{match}]? " if match else ""
    return ConfigIssue(name, "is not a section", f"{hint}The sections are {_sections()}")


def _keys_in(section: str) -> list[str]:
    names = [*known_keys(), *known_sections()]
    return sorted({last for head, _, last in (n.rpartition(".") for n in names) if head == section})


def _sections() -> str:
    return ", ".join(f"[{name}]" for name in known_sections())
