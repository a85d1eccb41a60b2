"""The handler of docs/guides/own_handler.md, trained and tested as the page says; and the tokenizer of
docs/guides/tokenizers.md."""

import os
import re
import subprocess
import sys
from pathlib import Path

import pytest

from tests.distributed import runs
from tests.forked import execute

PAGE = (runs.ROOT / "docs" / "guides" / "own_handler.md").read_text("utf-8")
LESSON, _, TESTING = PAGE.partition("## Testing it")

FORKED = """
import os
import subprocess

from tests.forked import execute


def run(words, check):
    done = execute(words, os.environ)
    assert done.returncode == 0, done.stdout + done.stderr


subprocess.run = run
"""
"""A conftest.py: what is started imports nothing again."""

FLOAT64 = [
    f"--training.{key}=float64"
    for key in ("dtype", "mixed_precision_param", "mixed_precision_reduce")
]
FLOAT64 += ["--training.steps=4", "--checkpoint.enable=false"]


def block(language: str, text: str) -> str:
    found = re.search(rf"^```{language}\n(.*?)^```", text, re.DOTALL | re.MULTILINE)
    assert found
    return found[1]


def environment(folder: Path) -> dict[str, str]:
    """With the modules of `folder` at hand."""
    made = runs.environment()
    made["PYTHONPATH"] = os.pathsep.join([str(folder), made["PYTHONPATH"]])
    return made


def run(folder: Path, toml: str, *arguments: str, processes: int = 1) -> list[float]:
    """The losses of a run with `toml` in its config."""
    words = runs.command(folder, *arguments, processes=processes)
    (folder.parent / "config.toml").write_text(runs.CONFIG + toml)
    done = execute(words, env=environment(folder.parent))
    assert done.returncode == 0, done.stderr
    return [loss for _, loss, _ in runs.curve(folder)]


def test_it_has_40_lines() -> None:
    assert len(block("python", LESSON).splitlines()) <= 40


def test_the_pages_handler_trains(tmp_path: Path) -> None:
    """By the page's own TOML, compiled, and cut into stages; it is listed with its settings."""
    (tmp_path / "my_handler.py").write_text(block("python", LESSON))
    toml = block("toml", LESSON)
    cut = ("--parallelism.pipeline_parallel_degree=2", "--model.handlers=grid,compile")
    cut += ("--handlers.compile.backend=aot_eager",)
    losses = run(tmp_path / "cut", toml, *FLOAT64, *cut, processes=2)
    plain = run(tmp_path / "plain", "", *FLOAT64)
    whole = run(tmp_path / "whole", toml, *FLOAT64)
    assert losses == pytest.approx(whole, rel=1e-9)
    assert whole != pytest.approx(plain, rel=1e-7), "the grid is there"
    words = [sys.executable, "-m", "torchtitan", "list", "handlers"]
    words += ["--job.custom_import", "my_handler"]
    listed = subprocess.run(words, env=environment(tmp_path), capture_output=True, text=True)
    assert re.search(r"grid +settings: spacing, largest \(from my_handler\)", listed.stdout)


def test_the_pages_test_of_it_passes(tmp_path: Path) -> None:
    (tmp_path / "my_handler.py").write_text(block("python", LESSON))
    (tmp_path / "test_my_handler.py").write_text(block("python", TESTING))
    (tmp_path / "conftest.py").write_text(FORKED)
    command = [sys.executable, "-m", "pytest", "-q", "-p", "no:cacheprovider", "test_my_handler.py"]
    done = subprocess.run(
        command, cwd=tmp_path, env=environment(tmp_path), capture_output=True, text=True
    )
    assert done.returncode == 0, done.stdout + done.stderr
    assert "2 passed" in done.stdout


def test_the_pages_tokenizer_trains(tmp_path: Path) -> None:
    page = (runs.ROOT / "docs" / "guides" / "tokenizers.md").read_text("utf-8")
    section = page.partition("## Custom tokenizers")[2]
    (tmp_path / "my_tokenizer.py").write_text(block("python", section))
    loss, _ = run(tmp_path / "run", block("toml", section), "--training.steps=2")
    assert loss == pytest.approx(3.33, abs=0.1), "the logarithm of 28 tokens"
