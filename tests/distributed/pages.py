"""Commands and files that a page of the documentation shows, and processes that run them."""

import re
import shlex
import signal
import subprocess
import sys
import time
from contextlib import closing
from pathlib import Path

from tests.distributed.runs import environment
from tests.forked import ForkedRun, execute

DOCS = Path(__file__).parents[2] / "docs"


def blocks(page: Path, language: str) -> list[str]:
    """Return the page's blocks in a language."""
    return re.findall(rf"^```{language}\n(.*?)^```", page.read_text(), re.DOTALL | re.MULTILINE)


def commands(page: Path) -> list[list[str]]:
    """Return the words of each command in the page."""
    return [shlex.split(line) for block in blocks(page, "bash") for line in block.splitlines()]


def prepare(folder: Path, smollm2: Path) -> None:
    """Put what the pages name into a folder that stands in for the root of a clone."""
    (folder / ".cache").mkdir()
    (folder / ".cache" / "smollm2").symlink_to(smollm2)
    for name in ("docs", "scripts"):
        (folder / name).symlink_to(DOCS.parent / name)


def command_line(words: list[str], *more: str) -> list[str]:
    """Return a command of a page with this interpreter."""
    if words[0] == "torchrun":
        words = ["-m", "torch.distributed.run", f"{words[1]}={words[2]}", *words[3:]]
    elif words[0] in ("python", sys.executable):
        words = words[1:]
    else:
        words = ["-m", *words]
    return [sys.executable, *words, *more]


def save_files(page: Path, folder: Path) -> None:
    """Save the blocks that begin with a file's name, as the page asks for."""
    for block in (*blocks(page, "python"), *blocks(page, "toml")):
        if named := re.match(r"# (\S+\.(?:py|toml))\n", block):
            (folder / named[1]).write_text(block)


def run(folder: Path, words: list[str], *more: str, stdin: str | None = None) -> str:
    """Return what a command of a page prints."""
    line = command_line(words, *more)
    if words[0] == "python" or stdin is not None:  # a script, or one that reads what is typed
        fresh = {"cwd": folder, "env": environment(), "input": stdin, "text": True}
        return subprocess.run(line, stdout=subprocess.PIPE, check=True, **fresh).stdout
    done = execute(line, environment(), folder, timeout=600)
    assert done.returncode == 0, done.stderr
    return done.stdout


def start(folder: Path, words: list[str], *more: str) -> "closing[ForkedRun]":
    """Start a command of a page, for a `with` statement."""
    return closing(ForkedRun(command_line(words, *more), environment(), folder))


def interrupt_after(step: int, run_folder: Path, folder: Path, words: list[str]) -> None:
    """Start a run, press Ctrl-C when it has logged a step, and wait until it has saved."""
    metrics = run_folder / "metrics.jsonl"
    with start(folder, words) as process:
        while not metrics.exists() or f'"step": {step}' not in metrics.read_text():
            assert process.poll() is None
            time.sleep(0.1)
        process.send_signal(signal.SIGINT)
        process.wait(600)
