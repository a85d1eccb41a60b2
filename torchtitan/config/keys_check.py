"""Check the keys of a TOML file: unknown, misplaced, tables that are values, secrets.

Checked before the values, so that pydantic only ever sees keys it knows and a misspelt key is
answered with what was meant.
"""

import datetime
import math
from collections.abc import Iterator, Sequence
from dataclasses import replace
from typing import Any

from torchtitan.config.compat.keys import (
    MISNAMED,
    OLD_KEYS,
    OTHER_TOOLS,
    OTHER_VALUES,
    TODAY,
)
from torchtitan.config.compat.translate import is_old_section
from torchtitan.config.errors import ConfigIssue
from torchtitan.config.fields import TOP_KEYS, known_keys, known_sections
from torchtitan.config.schema import MAX_INT64
from torchtitan.config.suggest import nearest
from torchtitan.utils.redaction import is_secret, names_a_secret

_SPECIAL_FLAGS = ("check", "help")
_RARE = ("evaluation", "validation")


def split_known(
    table: dict[str, Any], prefix: str = ""
) -> tuple[dict[str, Any], list[ConfigIssue]]:
    """Return the part of a TOML table that a config can hold, and the issues of the rest."""
    known: dict[str, Any] = {}
    issues: list[ConfigIssue] = []
    for key, value in table.items():
        name = prefix + key
        is_table = isinstance(value, dict)
        if "." in key:
            section, _, last = (key if key in known_keys() else name).rpartition(".")
            problem = "is one quoted key that contains a dot"
            fix = f"write `{last}` in [{section}], without quotes"
            issues.append(ConfigIssue(f'"{key}"', problem, fix))
        elif name in known_sections() and not is_table:
            fix = f"write a table: [{name}], and its keys below it"
            issues.append(ConfigIssue(name, "is a section, not a value", fix, value))
        elif name in known_keys():  # the users of a free-form table check its keys
            issues += _free_issues(name, value) if is_table else ()
            issues += [secret_issue(name)] if not is_table and is_secret("", value) else []
            known[key] = value
        elif name in known_sections() or (is_table and is_old_section(name)):
            inner, found = split_known(value, name + ".")
            issues += found
            if name in known_sections():
                known[key] = inner
        elif is_table and prefix and key in known_sections():
            fix = f"write its keys without `{key}.`, below a line [{key}]"
            issues.append(ConfigIssue(name, f"names the section [{key}] inside a section", fix))
        else:
            issues.append(unknown_key(name, name, value=value))
            if is_table:
                issues += _free_issues(name, value)
                issues += [
                    unknown_key(f"{name}.{k}", f"{name}.{k}") for k in value if k in OTHER_TOOLS
                ]
    return known, issues


def _free_issues(prefix: str, table: dict[str, Any]) -> Iterator[ConfigIssue]:
    """Check what no free-form table may hold, whatever its keys mean."""
    for key, value in table.items():
        name = f"{prefix}.{key}"
        if prefix in ("handlers", "sinks") and not isinstance(value, dict):
            fix = f"write [{prefix}.{key}], and the {prefix[:-1]}'s settings below it"
            yield ConfigIssue(name, "needs a table", fix, value)
        elif names_a_secret(key, value):
            yield secret_issue(name)
        elif isinstance(value, dict):
            yield from _free_issues(name, value)
        else:
            if is_secret("", value):
                yield secret_issue(name)
            yield from _value_issues(name, value)


def _value_issues(name: str, value: Any) -> Iterator[ConfigIssue]:
    """Yield an issue for each value that no setting can mean, in a table of unknown types."""
    for index, item in enumerate(value if isinstance(value, list) else [value]):
        place = f"{name}[{index}]" if isinstance(value, list) else name
        if isinstance(item, float) and not math.isfinite(item):
            yield ConfigIssue(place, "is not a finite number", "write a finite number", item)
        elif isinstance(item, int) and not -MAX_INT64 - 1 <= item <= MAX_INT64:
            yield ConfigIssue(place, "does not fit in 64 bits", "write a smaller number", item)
        elif isinstance(item, datetime.date | datetime.time):
            yield ConfigIssue(place, "is a date", "write it in quotes if text is meant", str(item))


def secret_issue(key: str) -> ConfigIssue:
    """Return the issue of a token in the config."""
    return ConfigIssue(
        key,
        "looks like a secret; configs are stored with the run and command lines are public",
        "remove it here, and set HF_TOKEN (or the service's own variable) in the environment",
    )


def unknown_key(shown: str, name: str, *, dashes: str = "", value: Any = "") -> ConfigIssue:
    """Return the issue of a dotted key that no section has; `shown` is how the user wrote it."""
    section, _, last = name.rpartition(".")
    if names_a_secret(name, value):
        return secret_issue(shown)
    top = MISNAMED.get(name, last)
    if top in TOP_KEYS:
        place = "at the top of a TOML" if dashes else "above the first [section] of the file"
        fix = f"write {place}: {TOP_KEYS[top].example}"
        return ConfigIssue(shown, "is no key of a section", fix)
    meant = [] if isinstance(value, dict) and last not in OTHER_TOOLS else meant_keys(name)
    if meant:
        places = " or ".join(f"`{dashes}{key}`" for key in meant)
        fix = f"write {places}"
        if last in OTHER_TOOLS and meant == [OTHER_TOOLS[last]]:
            of_value = f", {OTHER_VALUES[last]}" if last in OTHER_VALUES else ""
            return ConfigIssue(shown, "is a name of torchtune or transformers", fix + of_value)
        if any(key.rpartition(".")[2] != last for key in meant):
            return ConfigIssue(shown, "has another name here", fix)
        belongs = " or ".join(f"[{key.rpartition('.')[0]}]" for key in meant)
        return ConfigIssue(shown, f"belongs in section {belongs}", fix)
    if name in known_sections():
        fix = f"write `{shown}.KEY`; keys: {', '.join(_keys_in(name))}"
        return ConfigIssue(shown, "is a section, not a setting", fix)
    if not section and not dashes:
        match = nearest(name, known_sections())
        hint = f'did you mean "{match}"? ' if match else ""
        return ConfigIssue(name, "is not a section", hint + _all_sections())
    names = [*known_keys(), *OLD_KEYS, *(_SPECIAL_FLAGS if dashes else ())]
    siblings = {n.rpartition(".")[2]: n for n in names if section and n.startswith(section + ".")}
    match = siblings.get(nearest(last, siblings) or "") if siblings else nearest(name, names)
    hint = f"did you mean `{dashes}{TODAY.get(match, match)}`? " if match else ""
    if section not in known_sections():
        return ConfigIssue(shown, "is unknown", hint + _all_sections())
    keys = _keys_in(section)
    fix = f"{hint}Keys of [{section}]: {', '.join(keys)}"
    if "args" in keys:
        fix += f"; what {section}.name chooses has its own settings in [{section}.args]"
    return ConfigIssue(shown, "is unknown", fix)


def meant_keys(name: str) -> list[str]:
    """Return today's keys that a name which is none may mean.

    A name of other tools wins: `batch_size` is a key of [evaluation], and hardly meant as such.
    """
    section, _, last = name.rpartition(".")
    homes = [key.name for key in known_keys().values() if key.last_name == last]
    if name in MISNAMED:
        return [MISNAMED[name]]
    if last in OTHER_TOOLS:  # in a rare section one of its own keys is meant
        return [] if section in _RARE else [OTHER_TOOLS[last]]
    older = {today for old, today in TODAY.items() if old.rpartition(".")[2] == last}
    return homes or ([] if section else sorted(older))


def with_sections_once(issues: Sequence[ConfigIssue]) -> list[ConfigIssue]:
    """Return the issues with the list of all sections in the first one alone that has it."""
    text = _all_sections()
    long = [issue for issue in issues if text in issue.fix][1:]
    return [
        replace(i, fix=i.fix.replace(text, "the sections are named above")) if i in long else i
        for i in issues
    ]


def _all_sections() -> str:
    return f"The sections are {', '.join(f'[{known}]' for known in known_sections())}"


def _keys_in(section: str) -> list[str]:
    names = [*known_keys(), *known_sections()]
    return sorted({last for head, _, last in (n.rpartition(".") for n in names) if head == section})
