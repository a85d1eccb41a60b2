"""Measure the library: lines by subject, long constructors and files, docstrings.

    python scripts/code_sizes.py [--files] [--write]

Prints the table of docs/design/architecture.md. --files also lists what each row counts; --write
puts the table into the page. All lines count, including blank ones and docstrings.
"""

import argparse
import ast
import re
from collections.abc import Iterator
from dataclasses import dataclass
from pathlib import Path

ROOT = Path(__file__).parents[1]
LIBRARY = ROOT / "torchtitan"
PAGE = ROOT / "docs" / "design" / "architecture.md"
HEAD = "| | now | limit |"
MAX_ARGUMENTS = 8
MAX_FILE_LINES = 400
LONG_FILES = ("config/schema.py",)
"""Declarative: all sections in one place."""
SUBJECTS = {
    "the library": (22_000, ["**/*.py"]),
    "rejecting configs: checks, suggestions, older keys": (
        2_800,
        [
            "preflight/**/*.py",
            "config/compat/**/*.py",
            "config/keys_check.py",
            "config/suggest.py",
            "config/value_errors.py",
            "parallel/tensor_plan_checks.py",
        ],
    ),
    "Llama with FSDP, TP, activation checkpointing, compile": (
        1_200,
        [
            "models/decoder/**/*.py",
            "models/llama3.py",
            "models/attention.py",
            "models/batch.py",
            "models/embedding.py",
            "models/masks.py",
            "models/*norm*.py",
            "models/spec.py",
            "parallel/parallelize.py",
            "parallel/data_parallel.py",
            "parallel/tensor_parallel.py",
            "parallel/activation_checkpoint.py",
            "parallel/compile.py",
        ],
    ),
    "context parallelism": (700, ["parallel/context/**/*.py"]),
    "pipeline parallelism": (700, ["parallel/pipeline/**/*.py"]),
}
"""By subject: the wanted number of lines, and globs of the files that count."""
BAD_OPENINGS = ("What", "Whether", "Of", "That", "Where", "How", "When", "Which")


@dataclass(frozen=True)
class Docstring:
    """A public name, and the first word of its docstring; "" without one."""

    name: str
    opening: str


def files_of(patterns: list[str]) -> list[Path]:
    """Return the files of the library that match a pattern."""
    return sorted({path for pattern in patterns for path in LIBRARY.glob(pattern)})


def count_lines(path: Path) -> int:
    """Return the number of lines of a file."""
    return len(path.read_text(encoding="utf-8").splitlines())


def long_files() -> list[str]:
    """Return the files that are too long, with their lines."""
    lines = {_name(path): count_lines(path) for path in files_of(["**/*.py"])}
    long = [name for name in lines if lines[name] > MAX_FILE_LINES and name not in LONG_FILES]
    return [f"{name}: {lines[name]}" for name in long]


def long_constructors() -> list[str]:
    """Return the classes whose `__init__` takes too many arguments, `self` not counted."""
    found = []
    for path in files_of(["**/*.py"]):
        for node in ast.walk(ast.parse(path.read_text(encoding="utf-8"))):
            if not isinstance(node, ast.ClassDef):
                continue
            for method in node.body:
                if isinstance(method, ast.FunctionDef) and method.name == "__init__":
                    given = method.args
                    number = len(given.posonlyargs + given.args + given.kwonlyargs) - 1
                    if number > MAX_ARGUMENTS:
                        found.append(f"{_name(path)} {node.name}: {number}")
    return found


def docstrings() -> list[Docstring]:
    """Return the public modules, classes, functions and methods of the library."""
    found = []
    for path in files_of(["**/*.py"]):
        tree = ast.parse(path.read_text(encoding="utf-8"))
        name = _name(path)
        found.append(Docstring(name, _opening(tree)))
        found += [Docstring(f"{name} {inner}", text) for inner, text in _public(tree, "")]
    return found


def has_bad_opening(docstring: Docstring) -> bool:
    """Return True for a docstring that opens with a question word."""
    return docstring.opening.strip("`,:") in BAD_OPENINGS


def _name(path: Path) -> str:
    return path.relative_to(LIBRARY).as_posix()


def _public(node: ast.Module | ast.ClassDef, prefix: str) -> Iterator[tuple[str, str]]:
    for child in node.body:
        if isinstance(child, ast.ClassDef | ast.FunctionDef) and not child.name.startswith("_"):
            yield prefix + child.name, _opening(child)
            if isinstance(child, ast.ClassDef):
                yield from _public(child, f"{child.name}.")


def _opening(node: ast.Module | ast.ClassDef | ast.FunctionDef) -> str:
    return ((ast.get_docstring(node) or "").split() or [""])[0]


def table() -> str:
    """Return the table of the page, in Markdown."""
    rows = [HEAD, "|---|---|---|"]
    for subject, (limit, patterns) in SUBJECTS.items():
        files = files_of(patterns)
        lines = sum(map(count_lines, files))
        rows.append(f"| {subject} | {lines:,} lines in {len(files)} files | {limit:,} lines |")
    names = docstrings()
    share = sum(bool(name.opening) for name in names) / len(names)
    counts = {
        f"constructors with more than {MAX_ARGUMENTS} arguments": len(long_constructors()),
        f"files of more than {MAX_FILE_LINES} lines, {LONG_FILES[0]} excepted": len(long_files()),
        "docstrings that open with What, Whether and the like": sum(map(has_bad_opening, names)),
    }
    rows += [f"| {subject} | {count} | 0 |" for subject, count in counts.items()]
    return "\n".join([*rows, f"| public names with a docstring | {share:.1%} | 95% |"])


def main() -> None:
    """Print the table, and the files if asked."""
    parser = argparse.ArgumentParser(description=__doc__.splitlines()[0])
    parser.add_argument("--files", action="store_true", help="list what each row counts")
    parser.add_argument("--write", action="store_true", help="put the table into the page")
    options = parser.parse_args()
    print(table())
    if options.write:
        text = PAGE.read_text(encoding="utf-8")
        old = re.search(rf"^{re.escape(HEAD)}$.*?(?=^$)", text, re.DOTALL | re.MULTILINE)
        assert old, f"{PAGE} has no table"
        PAGE.write_text(text.replace(old[0], table() + "\n"), encoding="utf-8")
    if options.files:
        for subject, (_, patterns) in list(SUBJECTS.items())[1:]:
            print(f"\n{subject}:")
            for path in files_of(patterns):
                print(f"  {_name(path)}: {count_lines(path)}")
        print("\nlong constructors:", *long_constructors(), sep="\n  ")
        print("\nlong files:", *long_files(), sep="\n  ")
        names = docstrings()
        bad = [name.name for name in names if has_bad_opening(name)]
        print("\ndocstrings with a bad opening:", *bad, sep="\n  ")
        absent = [name.name for name in names if not name.opening]
        print("\nwithout a docstring:", *absent, sep="\n  ")


if __name__ == "__main__":
    main()
