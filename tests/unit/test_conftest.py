"""How tests are spread over the processes of pytest-xdist."""

from pathlib import Path

import pytest

from tests.conftest import PARTS

ROOT = Path(__file__).parents[2]


@pytest.mark.parametrize("name", PARTS)
def test_files_that_are_cut_exist(name: str) -> None:
    """One that was renamed would be run last, in one part."""
    assert (ROOT / name).is_file()
