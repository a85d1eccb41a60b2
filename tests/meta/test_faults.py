"""Each fault in docs/design/reliability.md is proved by a test, and tests name no others."""

import ast
import re
from collections.abc import Iterator
from pathlib import Path

ROOT = Path(__file__).parents[2]
PAGE = (ROOT / "docs" / "design" / "reliability.md").read_text()


def marks() -> Iterator[tuple[Path, str]]:
    """The files and the faults of `pytest.mark.fault("F01", ...)`."""
    for path in (ROOT / "tests").rglob("test_*.py"):
        for node in ast.walk(ast.parse(path.read_text())):
            if isinstance(node, ast.Call) and ast.unparse(node.func) == "pytest.mark.fault":
                yield from ((path, ast.literal_eval(name)) for name in node.args)


def test_every_fault_has_a_test() -> None:
    listed = re.findall(r"^\| (F\d\d) \|", PAGE, re.MULTILINE)
    assert listed == [f"F{number:02}" for number in range(1, 58)]
    marked = {name for _, name in marks()}
    assert marked == set(listed)


def test_the_page_names_files_that_prove_something() -> None:
    """A file that the page names as a proof has a test with a mark."""
    named = set(re.findall(r"`(tests/[\w/]+\.py)`", PAGE))
    assert named and named <= {path.relative_to(ROOT).as_posix() for path, _ in marks()}
