"""Spread of the tests over the processes of pytest-xdist, which have one thread each."""

import os
import sys
from collections import Counter
from pathlib import Path

import pytest

from tests.conftest import PARTS
from tests.forked import execute

ROOT = Path(__file__).parents[2]


@pytest.mark.parametrize("name", PARTS)
def test_files_that_are_cut_exist(name: str) -> None:
    """One that was renamed would be run last, in one part."""
    assert (ROOT / name).is_file()


def test_no_two_files_of_tests_have_one_name():
    """Folders of tests are no packages, so pytest would import one in place of the other."""
    names = Counter(file.name for file in (ROOT / "tests").rglob("test_*.py"))
    assert [name for name, count in names.items() if count > 1] == []


def test_no_process_of_the_tests_has_threads_that_spin():
    """Not the forked ones either: OpenMP reads the variable when torch is imported."""
    code = "import torch; print(torch.get_num_threads())"
    environment = {k: v for k, v in os.environ.items() if k != "OMP_NUM_THREADS"}
    assert execute([sys.executable, "-c", code], environment).stdout == "1\n"
