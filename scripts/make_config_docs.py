"""Write docs/reference/settings.md, and the tables of docs/start/from_torchtitan.md, from the code:
python scripts/make_config_docs.py"""

import re
from collections.abc import Iterator
from pathlib import Path

from torchtitan.commands.config import reference
from torchtitan.config.compat import keys as tables
from torchtitan.config.fields import free_table_of, known_keys
from torchtitan.config.toml_text import toml_value


def with_tables(page: str) -> str:
    """The page with its tables, each between two comments with its name."""
    for name, rows in (("keys", _keys()), ("not-built", _not_built())):
        before, comment, rest = re.split(f"(<!-- {name}:[^\n]*-->\n)", page)
        table = "\n".join(rows)
        page = f"{before}{comment}{table}\n<!-- end -->{rest.partition('<!-- end -->')[2]}"
    return page


def _keys() -> Iterator[str]:
    """A row for every old key that has another name today."""
    yield "| older | today |"
    yield "|---|---|"
    for name, target in sorted(tables.TODAY.items()):
        if name in tables.HANDLER_SWITCHES:
            yield f'| `{name}` | `model.handlers` with `"{tables.HANDLER_SWITCHES[name]}"` |'
        else:
            is_there = target in known_keys() or free_table_of(target)
            missing = "" if is_there else "; see below, it is not here yet"
            yield f"| `{name}` | `{target}`{_values(name)}{missing} |"
    for (name, value), today in tables.OLD_VALUES.items():
        yield f'| `{name} = "{value}"` | `{name} = "{today}"` |'


def _values(name: str) -> str:
    """Today's spelling of an old key's values, if it differs."""
    if name == tables.MICROBATCHES:
        return ", sequences of one microbatch: `local_batch_size` divided by the old number"
    if name == tables.CUSTOM_IMPORT:
        return ", a list"
    if name == tables.CONVERTERS:
        renamed = [f'`"{old}"` is `"{new}"`' for old, new in tables.CONVERTER_NAMES.items()]
        return f"; {', '.join(renamed)}"
    _, values = tables.CONVERTED.get(name, ("", {}))
    changed = [(old, new) for old, new in values.items() if old != new]
    words = [f"`{toml_value(old)}` is `{toml_value(new)}`" for old, new in changed]
    return f"; {', '.join(words)}" if words else ""


def _not_built() -> Iterator[str]:
    """A row for every feature that does not exist, with the keys that switch it on."""
    yield "| not here yet | accepted | what to do instead |"
    yield "|---|---|---|"
    for feature in tables.NOT_BUILT:
        keys = [
            f"`{name} = {' or '.join(toml_value(item) for item in off)}`"
            for name, off in feature.switches.items()
        ]
        yield f"| {feature.name} | {', '.join(keys)} | {feature.instead} |"


if __name__ == "__main__":
    docs = Path(__file__).resolve().parent.parent / "docs"
    page = docs / "reference" / "settings.md"
    page.write_text(reference(), encoding="utf-8")
    print(f"wrote {page}")
    page = docs / "start" / "from_torchtitan.md"
    page.write_text(with_tables(page.read_text(encoding="utf-8")), encoding="utf-8")
    print(f"wrote {page}")
