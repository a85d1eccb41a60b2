"""The loss of docs/guides/own_loss.md, and the settings of our own losses, in runs."""

import math
import os
import re
from pathlib import Path
from typing import Any

import pytest

from tests.distributed import runs
from tests.forked import execute

PAGE = (runs.ROOT / "docs" / "guides" / "own_loss.md").read_text("utf-8")
STEPS = 4
VALIDATED = (
    f"--training.steps={STEPS}",
    "--checkpoint.enable=false",
    "--validation.enable",
    "--validation.dataset=stdlib",
    "--validation.steps=1",
)
REGULARISED = ("--loss.args.z_loss_weight=0.01", "--loss.args.label_smoothing=0.1")


def block(language: str) -> str:
    found = re.search(rf"```{language}\n(.*?)```", PAGE, re.DOTALL)
    assert found
    return found[1]


def run(folder: Path, *arguments: str, processes: int = 1, toml: str = "") -> list[dict[str, Any]]:
    """The records of a run with the page's module at hand."""
    (folder.parent / "my_loss.py").write_text(block("python"))
    words = runs.command(folder, *arguments, processes=processes)
    (folder.parent / "config.toml").write_text(runs.CONFIG + toml)
    environment = runs.environment()
    environment["PYTHONPATH"] = os.pathsep.join([str(folder.parent), environment["PYTHONPATH"]])
    done = execute(words, env=environment)
    assert done.returncode == 0, done.stderr
    return runs.records(folder)


def same(rows: list[dict[str, Any]], others: list[dict[str, Any]], *keys: str) -> bool:
    """Whether the records have the same numbers, as float32 rounds them on another mesh."""
    assert len(rows) == len(others) == STEPS + 1, "the steps and the validation"
    ours, theirs = ([row[key] for row in of for key in keys if key in row] for of in (rows, others))
    return ours == pytest.approx(theirs, rel=1e-4)


def test_the_pages_loss_trains_on_any_mesh(tmp_path: Path) -> None:
    """With its setting, from the page's own TOML; and the vocabulary cut over two ranks."""
    one = run(tmp_path / "one", *VALIDATED, toml=block("toml"))
    two = run(
        tmp_path / "two",
        *VALIDATED,
        "--parallelism.tensor_parallel_degree=2",
        processes=2,
        toml=block("toml"),
    )
    assert same(one, two, "loss", "grad_norm", "validation/loss")
    plain = run(tmp_path / "plain", *VALIDATED)
    assert one[0]["loss"] < plain[0]["loss"]


def test_z_loss_and_smoothing_are_trained_with_and_not_measured(tmp_path: Path) -> None:
    """With a learning rate of 0 the model stays what it is: its validation is that of a plain run,
    and its cross entropy in training, too."""
    plain = run(tmp_path / "plain", *VALIDATED, "--optimizer.lr=0.0")
    ours = run(tmp_path / "ours", *VALIDATED, "--optimizer.lr=0.0", *REGULARISED)
    for row, other in zip(ours[:STEPS], plain, strict=False):
        assert row["loss/cross_entropy"] == pytest.approx(other["loss"], rel=1e-6)
        assert row["loss"] > other["loss"] + 0.1 and "loss/cross_entropy" not in other
    loss, perplexity = (ours[STEPS][f"validation/{of}"] for of in ("loss", "perplexity"))
    assert loss == pytest.approx(plain[STEPS]["validation/loss"], rel=1e-6)
    assert perplexity == pytest.approx(math.exp(loss))
