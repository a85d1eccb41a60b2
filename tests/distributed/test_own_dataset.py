"""The datasets that docs/guides/own_dataset.md shows how to write, trained on as it says."""

import os
import re
import signal
import subprocess
from pathlib import Path

from tests.distributed import runs
from tests.forked import execute

PAGE = (runs.ROOT / "docs" / "guides" / "own_dataset.md").read_text("utf-8")


def block(language: str) -> str:
    found = re.search(rf"```{language}\n(.*?)```", PAGE, re.DOTALL)
    assert found
    return found[1]


def run(
    folder: Path, *arguments: str, killed_after: int | None = None
) -> subprocess.CompletedProcess[str]:
    """A run on the page's module and with its TOML, in that of the tests' runs."""
    (folder.parent / "my_data.py").write_text(block("python"))
    words = runs.command(folder, *arguments)
    if killed_after is not None:
        words = runs.killed_after(killed_after, words)
    tables = '[training]\ndataset = "stdlib"\n'
    assert tables in runs.CONFIG
    (folder.parent / "config.toml").write_text(runs.CONFIG.replace(tables, block("toml")))
    environment = runs.environment()
    environment["PYTHONPATH"] = os.pathsep.join([str(folder.parent), environment["PYTHONPATH"]])
    return execute(words, env=environment)


def test_map_style_trains(tmp_path: Path) -> None:
    done = run(tmp_path / "run", "--training.steps=3")
    assert done.returncode == 0, done.stderr
    assert len(runs.curve(tmp_path / "run")) == 3


def test_iterable_goes_on_after_a_kill(tmp_path: Path) -> None:
    """From its state: the steps after the checkpoint, which both processes train, are the same."""
    folder = tmp_path / "run"
    done = run(folder, "--training.dataset=walks", killed_after=7)
    assert done.returncode == -signal.SIGKILL, done.stderr
    before = runs.curve(folder)
    assert len(before) == 7
    done = run(folder, "--training.dataset=walks")
    assert done.returncode == 0, done.stderr
    assert "Resumed from step 4" in done.stderr
    after = runs.curve(folder)
    assert len(after) == 10 and after[:7] == before
