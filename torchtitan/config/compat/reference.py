"""Write the tables of docs/from_torchtitan.md from the tables that translate."""

import re
from collections.abc import Iterator

from torchtitan.config.compat import keys as tables
from torchtitan.config.compat import translate as compat
from torchtitan.config.fields import free_table_of, known_keys
from torchtitan.config.toml_text import toml_value


def with_tables(page: str) -> str:
    """Return the page with its tables, each between two comments with its name."""
    for name, rows in (("keys", _keys()), ("not-built", _not_built())):
        before, comment, rest = re.split(f"(<!-- {name}:[^\n]*-->\n)", page)
        table = "\n".join(rows)
        page = f"{before}{comment}{table}\n<!-- end -->{rest.partition('<!-- end -->')[2]}"
    return page


def _keys() -> Iterator[str]:
    """Yield a row for every old key that has another name today."""
    yield "| older | today |"
    yield "|---|---|"
    for name in sorted(compat.old_defaults()):
        target = compat.today_name(name)
        if name in tables.HANDLER_SWITCHES:
            yield f'| `{name}` | `model.handlers` with `"{tables.HANDLER_SWITCHES[name]}"` |'
        elif target != name:
            is_there = target in known_keys() or free_table_of(target)
            missing = "" if is_there else "; see below, it is not here yet"
            yield f"| `{name}` | `{target}`{_values(name)}{missing} |"
    for (name, value), today in tables.OLD_VALUES.items():
        yield f'| `{name} = "{value}"` | `{name} = "{today}"` |'


def _values(name: str) -> str:
    """Return how values of an old key are written today, where that differs."""
    if name == tables.MICROBATCHES:
        return ", sequences of one microbatch: `local_batch_size` divided by the old number"
    if name == tables.CUSTOM_IMPORT:
        return ", a list"
    if name == tables.CONVERTERS:
        renamed = [f'`"{old}"` is `"{new}"`' for old, new in tables.CONVERTER_NAMES.items()]
        return f"; {', '.join(renamed)}"
    pairs = tables.CONVERTED[name].values if name in tables.CONVERTED else {}
    changed = [(old, new) for old, new in pairs.items() if old is not new]
    words = [f"`{toml_value(old)}` is `{toml_value(new)}`" for old, new in changed if old != new]
    return f"; {', '.join(words)}" if words else ""


def _not_built() -> Iterator[str]:
    """Yield a row for every feature that does not exist, with the keys that switch it on."""
    yield "| not here yet | accepted | what to do instead |"
    yield "|---|---|---|"
    for feature in tables.NOT_BUILT:
        keys = [
            f"`{name} = {' or '.join(toml_value(item) for item in off if item is not None)}`"
            if any(item is not None for item in off)
            else f"no `{name}`"
            for name, off in feature.switches.items()
        ]
        if keys:
            yield f"| {feature.name} | {', '.join(keys)} | {feature.instead} |"
    for (name, value), feature_name in tables.NOT_BUILT_VALUES.items():
        yield f'| {feature_name} | any `{name}` but `"{value}"` | |'
