"""The sizes that docs/design/architecture.md quotes, and the limits that are held."""

import re
import sys
from pathlib import Path

import pytest

ROOT = Path(__file__).parents[2]
sys.path.insert(0, str(ROOT / "scripts"))

import code_sizes  # noqa: E402

KNOWN_LONG_CONSTRUCTORS = {"PipelineRunner"}
"""To be shortened; no new ones."""


def rows(text: str) -> dict[str, float]:
    """The first number of each row of the table in `text`, by subject."""
    found = re.findall(r"^\| ([^|]+) \| ([\d,.]+)[^|]*\|[^|]*\|$", text, re.MULTILINE)
    return {subject: float(number.replace(",", "")) for subject, number in found}


def test_every_subject_has_files() -> None:
    for subject, (_, patterns) in code_sizes.SUBJECTS.items():
        assert code_sizes.files_of(patterns), subject


def test_limits() -> None:
    names = code_sizes.docstrings()
    assert len(names) > 500
    assert sum(bool(name.opening) for name in names) / len(names) >= 0.95
    found = {line.split()[1].rstrip(":") for line in code_sizes.long_constructors()}
    assert found <= KNOWN_LONG_CONSTRUCTORS
    assert code_sizes.long_files() == []


def test_the_page_quotes_the_sizes() -> None:
    """Within 5%, so that a small change needs no new page; `--write` updates it."""
    page, now = rows(code_sizes.PAGE.read_text()), rows(code_sizes.table())
    assert len(now) > 8
    for subject, number in now.items():
        assert page.get(subject) == pytest.approx(number, rel=0.05, abs=3), subject


def test_arguments_and_openings_are_counted(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    arguments = ", ".join(f"a{n}" for n in range(9))
    (tmp_path / "long.py").write_text(
        '"""What it is."""\nclass Long:\n    """A class."""\n'
        f"    def __init__(self, {arguments}): ...\n"
        "    def bare(self): ...\n    def _hidden(self): ...\n"
    )
    monkeypatch.setattr(code_sizes, "LIBRARY", tmp_path)
    assert code_sizes.long_constructors() == ["long.py Long: 9"]
    names = {name.name: name for name in code_sizes.docstrings()}
    assert set(names) == {"long.py", "long.py Long", "long.py Long.bare"}
    assert code_sizes.has_bad_opening(names["long.py"])
    assert not names["long.py Long.bare"].opening
