"""The datasets that docs/datasets.md shows how to write, trained on as it says."""

import os
import re
import signal
import subprocess
from pathlib import Path

from tests.distributed import runs

PAGE = (runs.ROOT / "docs" / "datasets.md").read_text("utf-8")
SECTION = PAGE.partition("## A dataset of one's own")[2]
DYING = """
import os, signal

rows = Walks.__iter__


def rows_and_death(self):
    for row in rows(self):
        if str(self.next_row) == os.environ.get("LAST_ROW"):
            os.kill(os.getpid(), signal.SIGKILL)
        yield row


Walks.__iter__ = rows_and_death
"""
"""For the test's copy of the page's module: a certain row kills the process that reads it."""


def block(language: str) -> str:
    found = re.search(rf"```{language}\n(.*?)```", SECTION, re.DOTALL)
    assert found
    return found[1]


def run(folder: Path, *arguments: str, **environment: str) -> subprocess.CompletedProcess[str]:
    """A run on the page's module and with its TOML, in that of the tests' runs."""
    (folder.parent / "my_data.py").write_text(block("python") + DYING)
    words = runs.command(folder, *arguments)
    tables = '[training]\ndataset = "stdlib"\n'
    assert tables in runs.CONFIG
    (folder.parent / "config.toml").write_text(runs.CONFIG.replace(tables, block("toml")))
    known = runs.environment() | environment
    known["PYTHONPATH"] = os.pathsep.join([str(folder.parent), known["PYTHONPATH"]])
    return subprocess.run(words, env=known, capture_output=True, text=True)


def test_map_style_trains(tmp_path: Path) -> None:
    done = run(tmp_path / "run", "--training.steps=3")
    assert done.returncode == 0, done.stderr
    assert len(runs.curve(tmp_path / "run")) == 3


def test_iterable_goes_on_after_a_kill(tmp_path: Path) -> None:
    """From its state: the steps that both processes trained are the same."""
    arguments = ("--training.dataset=walks", "--checkpoint.interval=5", "--training.steps=12")
    folder = tmp_path / "run"
    done = run(folder, *arguments, LAST_ROW="48")
    assert done.returncode == -signal.SIGKILL, done.stderr
    before = runs.curve(folder)
    assert 7 <= len(before) <= 9, "it dies some steps after the checkpoint, and before the next"
    done = run(folder, *arguments)
    assert done.returncode == 0, done.stderr
    assert "Resumed from step 5" in done.stderr
    after = runs.curve(folder)
    assert len(after) == 12 and after[: len(before)] == before
