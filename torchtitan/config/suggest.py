"""Suggestions for names that nobody knows."""

import difflib
from collections.abc import Iterable, Sequence

from torchtitan.config.errors import ConfigIssue


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
    unknown = [name for name in dict.fromkeys(chosen) if name not in known]
    for name in unknown:
        issues.append(ConfigIssue(key, f"is not a {kind}", fix_of_registered(name, known), name))
    for name in tables:
        if name not in known and name not in unknown:
            fix = fix_of_registered(name, known)
            issues.append(ConfigIssue(f"{kind}s.{name}", f"is not a {kind}", fix))
    for name in dict.fromkeys(chosen):
        if list(chosen).count(name) > 1:
            issues.append(ConfigIssue(key, "is listed twice", "list it once", name))
    return issues


def fix_of_glob(glob: str, names: Iterable[str]) -> str:
    """Return the fix for a glob that matches no name of a parameter."""
    names = list(names)
    parts = [name.split(".") for name in names]
    modules = {".".join(part[:n]) + ".*" for part in parts for n in range(1, len(part))}
    match = nearest(glob, [*names, *sorted(modules)])
    prefix = f'did you mean "{match}"? ' if match else ""
    return f"{prefix}Use a glob over full names such as {', '.join(names[:4])}, or leave it out"
