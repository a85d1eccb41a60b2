"""docs/start/from_torchtitan.md lists every older key, and every default that differs."""

import re
from pathlib import Path

from old_keys import COLUMNS

from scripts.make_config_docs import with_tables
from torchtitan.config.compat import keys as tables
from torchtitan.config.fields import known_keys

PAGE = Path(__file__).parents[3] / "docs" / "start" / "from_torchtitan.md"


def test_the_page_s_tables_are_current():
    page = PAGE.read_text(encoding="utf-8")
    assert with_tables(page) == page, "run scripts/make_config_docs.py"


def test_the_page_has_every_older_key():
    page = PAGE.read_text(encoding="utf-8")
    names = set(tables.OLD_KEYS) - set(tables.NOT_BUILT_SETTINGS)
    assert [name for name in sorted(names) if f"`{name}" not in page] == []


def test_the_page_has_every_default_that_differs():
    """From those of the last release with TOML."""
    page = PAGE.read_text(encoding="utf-8")
    rows = set(re.findall(r"^\| `([\w.]+)` \|[^|]*\|[^|]*\|$", page, re.MULTILINE))
    differing = set()
    for name, default in COLUMNS["v0.2.2"].items():
        here = known_keys()[name].default if name in known_keys() else default
        if (list(here) if isinstance(here, tuple) else here) != default:
            differing.add(name)
    differing.discard("parallelism.module_fqns_per_model_part")  # unset in two spellings
    assert rows == differing
