"""Write tests/assets/c4_test: a small dataset in C4's layout, out of this repository's own text.

    python scripts/make_c4_test.py [FOLDER]

Documents are the sections of the docs and the docstrings of the package: text that is on every
machine that has a clone, and under the repository's licence. The files are the same bytes whenever
that text is; they are committed, so a later change of the docs does not change the tests' data.
"""

import ast
import gzip
import json
import re
import sys
from collections.abc import Iterator
from pathlib import Path

ROOT = Path(__file__).resolve().parents[1]
FOLDER = ROOT / "tests" / "assets" / "c4_test"
NUM_TRAIN_FILES = 4
VALIDATION_SHARE = 20
"""Every n-th document is for validation."""
FEWEST_CHARACTERS = 60
TIMESTAMP = "2025-01-01T00:00:00Z"


def documents() -> Iterator[tuple[str, str]]:
    """URL and text of each document, in a fixed order."""
    for page in sorted([*ROOT.glob("*.md"), *ROOT.glob("docs/**/*.md")]):
        name = page.relative_to(ROOT).as_posix()
        for number, section in enumerate(re.split(r"\n(?=#)", page.read_text("utf-8"))):
            yield f"file:{name}#{number}", section.strip()
    for module in sorted(ROOT.glob("torchtitan/**/*.py")):
        name = module.relative_to(ROOT).as_posix()
        for node in ast.walk(ast.parse(module.read_text("utf-8"))):
            kinds = ast.Module | ast.ClassDef | ast.FunctionDef | ast.AsyncFunctionDef
            text = ast.get_docstring(node) if isinstance(node, kinds) else None
            if text:
                yield f"file:{name}#{getattr(node, 'name', '')}", text


def write(file: Path, rows: list[tuple[str, str]]) -> None:
    """C4's columns, in its order; the time of packing is left out of the file."""
    lines = [
        json.dumps({"text": text, "timestamp": TIMESTAMP, "url": url}, ensure_ascii=False)
        for url, text in rows
    ]
    content = "".join(line + "\n" for line in lines).encode()
    file.write_bytes(gzip.compress(content, compresslevel=9, mtime=0))


def main(folder: Path) -> None:
    """Write the files and say how much they hold."""
    rows = [(url, text) for url, text in documents() if len(text) >= FEWEST_CHARACTERS]
    validation = rows[::VALIDATION_SHARE]
    train = [row for number, row in enumerate(rows) if number % VALIDATION_SHARE]
    english = folder / "en"
    english.mkdir(parents=True, exist_ok=True)
    for n in range(NUM_TRAIN_FILES):
        name = f"c4-train.{n:05}-of-{NUM_TRAIN_FILES:05}.json.gz"
        write(english / name, train[n::NUM_TRAIN_FILES])
    write(english / "c4-validation.00000-of-00001.json.gz", validation)
    size = sum(file.stat().st_size for file in english.iterdir())
    print(f"{len(train)} + {len(validation)} documents, {size} bytes in {english}")


if __name__ == "__main__":
    main(Path(sys.argv[1]) if len(sys.argv) > 1 else FOLDER)
