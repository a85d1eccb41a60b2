"""The pictures in docs/images are what scripts/make_pictures.py draws now."""

import re
import subprocess
import sys
from pathlib import Path

import pytest

ROOT = Path(__file__).parents[2]
SCRIPT = ROOT / "scripts" / "make_pictures.py"
LINES = r"([\d.]+)k lines"


@pytest.fixture(scope="module")
def drawn(tmp_path_factory: pytest.TempPathFactory) -> Path:
    folder = tmp_path_factory.mktemp("pictures")
    command = [
        sys.executable,
        str(SCRIPT),
        str(folder),
    ]  # it joins a process group that is not real
    subprocess.run(command, check=True, capture_output=True, timeout=120)
    return folder


@pytest.mark.parametrize("name", ["mesh", "pipeline", "rooms", "batch"])
def test_picture_is_current(name: str, drawn: Path):
    """Lines of code may differ by a fifth, as they change every day."""
    for page in ("light", "dark"):
        old, new = (
            (folder / f"{name}-{page}.svg").read_text(encoding="utf-8")
            for folder in (ROOT / "docs" / "images", drawn)
        )
        assert re.sub(LINES, "", old) == re.sub(LINES, "", new), "run scripts/make_pictures.py"
        counts = zip(re.findall(LINES, old), re.findall(LINES, new))
        assert [(a, b) for a, b in counts if abs(float(a) - float(b)) > 0.1 + 0.2 * float(b)] == []


def test_pictures_show_the_mesh_and_the_idle_share(drawn: Path):
    """As docs/guides/parallelism.md has them: rank 0's neighbours, and bubbles by formula."""
    mesh = (drawn / "mesh-light.svg").read_text(encoding="utf-8")
    assert re.findall(r">(ranks? [\d, ]+)<", mesh)[-4:] == [
        "rank 1",
        "rank 2",
        "ranks 2, 4, 6",
        "rank 8",
    ]
    pipeline = (drawn / "pipeline-light.svg").read_text(encoding="utf-8")
    p, n = 4, 8
    bubbles = [(p - 1) / (n + p - 1), (p - 1) / (2 * n + p - 1), (p - 1) / (6 * n + p - 1)]
    assert re.findall(r">(\d+%) idle<", pipeline) == [f"{bubble:.0%}" for bubble in bubbles]


def test_each_picture_is_shown_for_light_and_dark_pages():
    pages = "\n".join(page.read_text(encoding="utf-8") for page in (ROOT / "docs").rglob("*.md"))
    for path in (ROOT / "docs" / "images").glob("*.svg"):
        assert f'"../images/{path.name}"' in pages, path.name
