"""The docs as a site: mkdocs builds it without a warning, and warns of what would be broken."""

import json
import os
import re
import shutil
import subprocess
import sys
from pathlib import Path

import pytest

ROOT = Path(__file__).parents[2]


def build(clone: Path, target: Path) -> subprocess.CompletedProcess[str]:
    return subprocess.run(
        [sys.executable, "-m", "mkdocs", "build", "--strict", "--site-dir", str(target)],
        cwd=clone,
        env={**os.environ, "NO_MKDOCS_2_WARNING": "1"},
        capture_output=True,
        text=True,
        timeout=120,
    )


@pytest.fixture(scope="module")
def site(tmp_path_factory: pytest.TempPathFactory) -> Path:
    target = tmp_path_factory.mktemp("site")
    done = build(ROOT, target)
    assert done.returncode == 0, done.stderr
    return target


def test_every_page_is_built_and_found_by_the_search(site: Path):
    index = (site / "search" / "search_index.json").read_text()
    for page in (ROOT / "docs").rglob("*.md"):
        place = page.relative_to(ROOT / "docs").with_suffix("")
        place = place.parent if place.name in ("index", "README") else place
        assert (site / place / "index.html").is_file()
        assert f'"location":"{place.as_posix().removeprefix(".")}' in index
    assert "source/" not in index, "files of the clone would bury the pages"
    preferred = [doc["location"] for doc in json.loads(index)["docs"] if doc.get("boost")]
    assert {"reference/messages/", "reference/settings/"} <= set(preferred)


def test_a_page_shows_the_files_of_the_clone_that_it_links_to(site: Path):
    page = (site / "reference" / "registries" / "index.html").read_text()
    assert 'href="../../source/train_configs/llama3_8b.toml/"' in page
    shown = (site / "source" / "train_configs" / "llama3_8b.toml" / "index.html").read_text()
    assert "dump_folder" in shown
    assert 'href="../../SECURITY/"' in (site / "guides" / "launching" / "index.html").read_text()


def test_pages_load_nothing_from_the_network(site: Path):
    loads = r'<(?:script|img|source|iframe|link)\b[^>]*(?:src|href|srcset)="?(?:https?:)?//[^>]*>'
    for page in site.rglob("*.html"):
        assert re.findall(loads, page.read_text()) == [], page
    for style in site.rglob("*.css"):
        assert re.findall(r"url\(['\"]?(?:https?:)?//|@import", style.read_text()) == [], style


def test_what_is_broken_fails(tmp_path: Path):
    """Links, anchors and pictures that lead nowhere, and pages that only nav or only docs/ has.

    A file outside the clone, or one that is no text, is nowhere, too.
    """
    (tmp_path / "outside.toml").write_text("private = 1\n")
    tmp_path /= "clone"
    tmp_path.mkdir()
    (tmp_path / "binary.dat").write_bytes(b"\xff\xfe")
    for path in ROOT.iterdir():
        if path.name not in ("docs", "mkdocs.yml"):
            (tmp_path / path.name).symlink_to(path)
    shutil.copytree(ROOT / "docs", tmp_path / "docs")
    page = tmp_path / "docs" / "guides" / "metrics.md"
    faults = (
        "[a](no_page.md) [b](losses.md#no-anchor) [c](../../train_configs/no.toml) ![d](no.svg)"
        " [f](../../../outside.toml) [g](../../binary.dat)"
    )
    page.write_text(f"{page.read_text()}\n{faults}\n")
    (tmp_path / "docs" / "guides" / "orphan.md").write_text("# Orphan\n")
    cells = [{"cell_type": "markdown", "source": ["# Notes\n", "[e](no_notes.md)"]}]
    (tmp_path / "docs" / "guides" / "notes.ipynb").write_text(json.dumps({"cells": cells}))
    nav = (ROOT / "mkdocs.yml").read_text()
    (tmp_path / "mkdocs.yml").write_text(nav.replace("nav:\n", "nav:\n  - ghost.md\n"))
    done = build(tmp_path, tmp_path / "site")
    warnings = [line for line in done.stderr.splitlines() if line.startswith("WARNING")]
    assert done.returncode != 0
    found = (
        "no_page.md",
        "#no-anchor",
        "train_configs/no.toml",
        "no.svg",
        "ghost.md",
        "no_notes.md",
        "outside.toml",
        "binary.dat",
    )
    for fault in found:
        assert len([line for line in warnings if fault in line]) == 1, done.stderr
    assert "  - guides/orphan.md" in done.stderr and "  - guides/notes.md" in done.stderr
    assert len(warnings) == len(found) + 1, done.stderr
