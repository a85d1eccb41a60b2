"""Names that are not known: what was probably meant."""

import difflib
from collections.abc import Iterable
from typing import Any

from torchtitan.config.errors import ConfigIssue
from torchtitan.config.fields import known_keys, known_sections
from torchtitan.config.legacy import is_old_key, old_defaults, today_name
from torchtitan.config.legacy_keys import MISNAMED
from torchtitan.utils.redaction import names_a_secret

CUTOFF = 0.65
_SPECIAL_FLAGS = ("check", "help")


def nearest(name: str, candidates: Iterable[str]) -> str | None:
    """The candidate most like `name`, or that begins with it, if that can be what was meant."""
    by_lower = {candidate.lower(): candidate for candidate in candidates}
    matches = difflib.get_close_matches(name.lower(), by_lower, n=1, cutoff=CUTOFF)
    if not matches and len(name) > 1:
        matches = [candidate for candidate in by_lower if candidate.startswith(name.lower())]
    return by_lower[matches[0]] if matches else None


def did_you_mean(name: str, candidates: Iterable[str]) -> str:
    """The fix for a name that is none of the candidates."""
    candidates = list(candidates)
    match = nearest(name, candidates)
    choices = f"choose from {', '.join(candidates)}" if candidates else "there is none to choose"
    return f'did you mean "{match}"? Otherwise {choices}' if match else choices


def fix_of_registered(name: str, known: Iterable[str]) -> str:
    """The fix for a name that nobody has registered, which may be one of the user's own."""
    return f"{did_you_mean(name, known)}; for one of your own, name its module in job.custom_import"


def fix_of_glob(glob: str, names: Iterable[str]) -> str:
    """The fix for a glob over names of parameters that matches none of them."""
    names = list(names)
    parts = [name.split(".") for name in names]
    modules = {".".join(part[:n]) + ".*" for part in parts for n in range(1, len(part))}
    match = nearest(glob, [*names, *sorted(modules)])
    kinds = {".".join(part[-2:]): ".".join(part) for part in reversed(parts)}
    examples = ", ".join(list(reversed(kinds.values()))[:4])
    prefix = f'did you mean "{match}"? ' if match else ""
    return f"{prefix}Use a glob over full names such as {examples}, or leave it out"


def secret_problem(key: str) -> ConfigIssue:
    """A token in the config: it would be stored with the run, and shown by `ps` to everyone."""
    return ConfigIssue(
        key,
        "looks like a secret; configs are stored with the run and command lines are public",
        "remove it here, and set HF_TOKEN (or the service's own variable) in the environment",
    )


def unknown_key(
    shown: str, name: str, *, from_command_line: bool = False, value: Any = ""
) -> ConfigIssue:
    """The problem of a dotted key that no section has; `shown` is how the user wrote it."""
    if names_a_secret(name, value):
        return secret_problem(shown)
    dashes = "--" if from_command_line else ""
    if name in MISNAMED:
        return ConfigIssue(shown, "has another name here", f"write `{dashes}{MISNAMED[name]}`")
    if from_command_line and name in known_sections():
        fix = f"write `--{name}.KEY`; keys: {', '.join(_keys_in(name))}"
        return ConfigIssue(shown, "is a section, not a setting", fix)
    is_word = from_command_line and "." not in name
    special = nearest(name, _SPECIAL_FLAGS) if is_word else None
    if special:
        return ConfigIssue(shown, "is unknown", f"did you mean `--{special}`?")
    section, _, last = name.rpartition(".")
    homes = [key for key in known_keys().values() if key.last_name == last]
    if homes:
        places = " or ".join(f"`{dashes}{key.name}`" for key in homes)
        belongs = " or ".join(f"[{key.section}]" for key in homes)
        return ConfigIssue(shown, f"belongs in section {belongs}", f"write {places}")
    if section in known_sections():
        keys = _keys_in(section)
        match = nearest(last, keys)
        if match is None:
            old = [key.rpartition(".") for key in old_defaults() if is_old_key(key)]
            match = nearest(last, [key for head, _, key in old if head == section])
        name_today = match and today_name(f"{section}.{match}")
        prefix = f"did you mean `{dashes}{name_today}`? " if match else ""
        fix = f"{prefix}Keys of [{section}]: {', '.join(keys)}"
        if "args" in keys:
            fix += f"; what {section}.name chooses has its own settings in [{section}.args]"
        return ConfigIssue(shown, "is unknown", fix)
    match = nearest(name, [*known_keys(), *old_defaults()])
    if match:
        return ConfigIssue(shown, "is unknown", f"did you mean `{dashes}{today_name(match)}`?")
    return ConfigIssue(shown, "is unknown", f"the sections are {_sections()}")


def unknown_section(name: str) -> ConfigIssue:
    """The problem of a table, or of a key at the top level, that is not a section."""
    if names_a_secret(name):
        return unknown_key(name, name)
    match = nearest(name, known_sections())
    prefix = f"did you mean [{match}]? " if match else ""
    return ConfigIssue(name, "is not a section", f"{prefix}The sections are {_sections()}")


def _keys_in(section: str) -> list[str]:
    names = [*known_keys(), *known_sections()]
    return sorted({last for head, _, last in (n.rpartition(".") for n in names) if head == section})


def _sections() -> str:
    return ", ".join(f"[{name}]" for name in known_sections())
