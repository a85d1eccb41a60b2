"""Random kills: a few here, hundreds by `python scripts/soak.py`."""

import sys
from pathlib import Path

import pytest

sys.path.insert(0, str(Path(__file__).parents[2] / "scripts"))

import soak


def check(folder: Path, kills: int, seed: int, steps: int) -> None:
    figures = soak.soak(folder, kills, seed, 1e9, steps)
    assert figures.faults == [], soak.describe(figures, 0)
    assert figures.kills.total() == kills and figures.compared


@pytest.mark.timeout(1200)
@pytest.mark.fault("F01", "F02", "F04", "F32", "F54")
def test_a_few_kills(tmp_path: Path) -> None:
    """On a mesh that stays; bit by bit the run that nothing happened to."""
    check(tmp_path, 5, seed=5, steps=12)


@pytest.mark.nightly
@pytest.mark.timeout(7200)
@pytest.mark.fault("F01", "F02", "F03", "F04", "F05", "F06", "F10", "F13", "F30", "F54")
def test_two_hundred_kills(tmp_path: Path) -> None:
    check(tmp_path, 200, seed=0, steps=40)
