"""The pages about what can be added, and about what is refused, are those of the code."""

import os
import re
import subprocess
import sys
from pathlib import Path

from torchtitan.config.fields import known_keys
from torchtitan.handlers.registry import HANDLERS

ROOT = Path(__file__).parents[2]
KINDS = {
    found[1]: found[2]
    for path in (ROOT / "torchtitan").rglob("*.py")
    for found in re.finditer(
        r'\w+: Registry\[.*?\] = Registry\(\s*("[\w.]+"|KEY),\s*"([\w.]+)"', path.read_text()
    )
}
"""Of every registry the key of the config (quoted, or by a name) and the group of entry points."""


def is_a_key(key: str) -> bool:
    table, _, last = key.rpartition(".")
    handler = HANDLERS.get(table.removeprefix("handlers."))
    return key in known_keys() or (handler is not None and last in handler.settings.model_fields)


def test_every_registry_is_on_the_page() -> None:
    page = (ROOT / "docs" / "guides" / "extending.md").read_text()
    rows = re.findall(r"^\| [^|]+ \| `([\w.]+)` \| `@?(\w+)\(.*?\)` \| `([\w.]+)` \|", page, re.M)
    assert len(rows) == len(KINDS) == 9
    assert {group for _, _, group in rows} == set(KINDS.values())
    sources = "".join(path.read_text() for path in (ROOT / "torchtitan").rglob("*.py"))
    help_text = known_keys()["job.custom_import"].doc
    for key, function, group in rows:
        quoted = [name for name, other in KINDS.items() if other == group]
        assert quoted in ([f'"{key}"'], ["KEY"]), key
        assert f"def {function}(" in sources and is_a_key(key)
        kind = group.removeprefix("torchtitan.")
        assert kind in help_text, f"job.custom_import does not tell of {kind}"
        assert kind in (ROOT / "torchtitan" / "config" / "custom_import.py").read_text()


def test_the_page_of_refusals_is_current() -> None:
    """And made without torch, as the checks are."""
    code = (
        "import sys, make_refusals; text = make_refusals.page();"
        " assert 'torch' not in sys.modules; sys.stdout.write(text)"
    )
    path = os.pathsep.join([str(ROOT / "scripts"), str(ROOT)])
    made = subprocess.run(
        [sys.executable, "-c", code],
        env={**os.environ, "PYTHONPATH": path},
        capture_output=True,
        text=True,
        timeout=240,
    )
    assert made.returncode == 0, made.stderr
    page = (ROOT / "docs" / "reference" / "refusals.md").read_text("utf-8")
    assert made.stdout == page, "python scripts/make_refusals.py makes it"


def test_what_is_refused_is_told() -> None:
    """Some lines that have to be there, by whoever wrote the checks."""
    lines = (ROOT / "docs" / "reference" / "refusals.md").read_text().splitlines()

    def has(*parts: str) -> bool:
        return any(all(part in line for part in parts) for line in lines)

    assert has("llama2 13B", "| tensor 16, 32 |", "does not divide model.args.n_heads")
    assert has("`float8`, sent in float8", "DDP")
    assert has("`mxfp8`, on CPUs", "all", "Blackwell")
    assert has("`compile`", "has to come after", "`float8`")
