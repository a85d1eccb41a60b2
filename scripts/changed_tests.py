"""Print the test files that the changed files can affect, one a line.

    python scripts/changed_tests.py                 what differs from the merge base with main
    python scripts/changed_tests.py FILE ...        these files

A test file depends on what it imports, on what that imports, and on whatever these name in a
string: a module, a file or its folder. What every test depends on (a conftest.py, the list of
requirements) and what no test names selects all of them.
"""

import ast
import re
import subprocess
import sys
from collections.abc import Iterable, Iterator
from functools import cache
from pathlib import Path

ROOT = Path(__file__).parents[1]
ALWAYS = ("test_linters.py", "test_sizes.py", "test_docs.py", "test_imports.py", "test_site.py")
ALWAYS += ("test_reference_pages.py", "test_pictures.py")
"""These read the whole clone."""
EVERYTHING = ("pyproject.toml", "constraints.txt", "conftest.py")
NOT_NAMES = ("", "/", "torchtitan", "tests", "scripts")
"""Folders that hold too much to say which test reads what."""


def git(*arguments: str) -> list[str]:
    """Return the lines that a git command prints; none if it fails."""
    done = subprocess.run(["git", *arguments], cwd=ROOT, capture_output=True, text=True)
    return done.stdout.splitlines() if done.returncode == 0 else []


def changed_files() -> list[str]:
    """Return the files that differ from the merge base with main, committed or not."""
    bases = (git("merge-base", "HEAD", name) for name in ("main", "origin/main", "HEAD"))
    base = next(found[0] for found in bases if found)
    untracked = git("ls-files", "--others", "--exclude-standard")
    return sorted({*git("diff", "--name-only", "--no-renames", base), *untracked})


def test_files() -> list[str]:
    """Return the test files, relative to the clone."""
    return sorted(str(path.relative_to(ROOT)) for path in (ROOT / "tests").rglob("test_*.py"))


def _files_of(module: str, folder: Path) -> Iterator[str]:
    """Yield the file of a module and those of the packages around it."""
    parts = module.split(".")
    if parts[0] not in ("torchtitan", "tests"):
        parts = [*folder.relative_to(ROOT).parts, parts[0]]  # tests import their neighbours
    for count in range(1, len(parts) + 1):
        path = ROOT.joinpath(*parts[:count])
        for file in (path / "__init__.py", path.with_suffix(".py")):
            if file.is_file():
                yield str(file.relative_to(ROOT))


@cache
def dependencies(name: str) -> tuple[frozenset[str], frozenset[str]]:
    """Return the files of the clone that a Python file imports, and the strings in it."""
    path, modules, strings = ROOT / name, [], set()
    for node in ast.walk(ast.parse(path.read_text("utf-8"))):
        if isinstance(node, ast.Import):
            modules += [alias.name for alias in node.names]
        elif isinstance(node, ast.ImportFrom) and node.module and not node.level:
            modules += [node.module, *(f"{node.module}.{alias.name}" for alias in node.names)]
        elif isinstance(node, ast.Constant) and isinstance(node.value, str):
            strings.add(node.value)
            if node.value.startswith(("torchtitan.", "tests.")):
                modules.append(node.value.partition(":")[0])
    files = {file for module in modules for file in _files_of(module, path.parent)}
    return frozenset(files - {name}), frozenset(strings)


def closure(names: Iterable[str], inside: str = "") -> set[str]:
    """Return the files and all that they import, directly or not, under a folder."""
    found, todo = set(), list(names)
    while todo:
        name = todo.pop()
        if name not in found:
            found.add(name)
            todo += [file for file in dependencies(name)[0] if file.startswith(inside)]
    return found


def words_of(tests_file: str) -> set[str]:
    """Return the names of files and folders in the strings of a Python file."""
    return {word for text in dependencies(tests_file)[1] for word in re.split(r"[\\/\s]+", text)}


def affected(changed: Iterable[str]) -> list[str]:
    """Return the test files that the changed files can affect."""
    tests = test_files()
    needs, words = {test: closure([test]) for test in tests}, {}
    for test in tests:
        helpers = [name for name in needs[test] if name.startswith("tests/")]
        words[test] = set().union(*map(words_of, helpers))
        around = [str(parent / "conftest.py") for parent in Path(test).parents]
        # What a conftest.py imports of the library serves some test of its folder, not each.
        needs[test] |= closure([name for name in around if (ROOT / name).is_file()], "tests/")
    selected = {test for test in tests if Path(test).name in ALWAYS}
    for file in changed:
        path = Path(file)
        names = {path.name} if path.suffix else set()
        if path.suffix != ".py":
            names |= {parent.name for parent in path.parents} - {*NOT_NAMES}
        found = {test for test in tests if file in needs[test] or names & words[test]}
        if path.name in EVERYTHING or not found:
            return tests
        selected |= found
    return sorted(selected)


if __name__ == "__main__":
    print(*affected(sys.argv[1:] or changed_files()), sep="\n")  # none changed: the linters
