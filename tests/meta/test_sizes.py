"""Files and functions stay of a size that one can read."""

import ast
from pathlib import Path

ROOT = Path(__file__).parents[2]
FOLDERS = ("torchtitan", "tests", "scripts")
FILES = [path for folder in FOLDERS for path in (ROOT / folder).rglob("*.py")]
MAX_FILE_LINES = 400
LONGER_FILES = {"torchtitan/config/schema.py"}  # declarations alone
MAX_FUNCTION_LINES = 60
LONGER_FUNCTIONS = {"train": 132}  # the loop, which reads top to bottom


def _functions(tree: ast.AST):
    for node in ast.walk(tree):
        if isinstance(node, ast.FunctionDef | ast.AsyncFunctionDef):
            yield node.name, node.lineno, (node.end_lineno or node.lineno) - node.lineno + 1


def test_the_walk_finds_the_code():
    assert ROOT / "torchtitan" / "config" / "schema.py" in FILES
    assert [name for name, *_ in _functions(ast.parse(Path(__file__).read_text()))]


def test_no_file_is_too_long():
    lines = {str(p.relative_to(ROOT)): len(p.read_text().splitlines()) for p in FILES}
    assert {path for path, n in lines.items() if n > MAX_FILE_LINES} <= LONGER_FILES


def test_no_function_is_too_long():
    long = [
        f"{path.relative_to(ROOT)}:{line} {name}: {length} lines"
        for path in FILES
        for name, line, length in _functions(ast.parse(path.read_text()))
        if length > LONGER_FUNCTIONS.get(name, MAX_FUNCTION_LINES)
    ]
    assert long == []
