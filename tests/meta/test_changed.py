"""`./run_tests.sh --changed` runs what a change can affect, and all where that is not known."""

import importlib.util
import sys
from pathlib import Path
from types import ModuleType

import pytest

ROOT = Path(__file__).parents[2]
TREE = {
    "torchtitan/__init__.py": "",
    "torchtitan/top.py": "def start():\n    from torchtitan import middle",
    "torchtitan/middle.py": "from torchtitan.leaf import word",
    "torchtitan/leaf.py": "word = 1",
    "torchtitan/named.py": "",
    "tests/conftest.py": "import torchtitan.top\nfrom tests.helper import help",
    "tests/helper.py": "",
    "tests/test_leaf.py": "from torchtitan.leaf import word",
    "tests/test_top.py": "import torchtitan.top",
    "tests/unit/neighbour.py": "PAGE = ROOT / 'docs' / 'page.md'",
    "tests/unit/test_page.py": "import neighbour\nimport json",
    "tests/unit/test_named.py": "CODE = 'torchtitan.named:function'",
    "tests/unit/test_script.py": "RUN = 'scripts/make_it.py'",
    "tests/meta/test_linters.py": "",
}
LINTERS = "tests/meta/test_linters.py"


@pytest.fixture
def selection(monkeypatch: pytest.MonkeyPatch) -> ModuleType:
    path = ROOT / "scripts" / "changed_tests.py"
    spec = importlib.util.spec_from_file_location("changed_tests", path)
    assert spec and spec.loader
    module = importlib.util.module_from_spec(spec)
    monkeypatch.setitem(sys.modules, "changed_tests", module)
    spec.loader.exec_module(module)
    return module


@pytest.fixture
def small_clone(selection: ModuleType, tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    for name, text in TREE.items():
        (tmp_path / name).parent.mkdir(parents=True, exist_ok=True)
        (tmp_path / name).write_text(text)
    monkeypatch.setattr(selection, "ROOT", tmp_path)


@pytest.mark.parametrize(
    ("changed", "expected"),
    [
        ("torchtitan/leaf.py", ["test_leaf", "test_top"]),
        ("torchtitan/middle.py", ["test_top"]),
        ("torchtitan/top.py", ["test_top"]),
        ("torchtitan/named.py", ["unit/test_named"]),
        ("tests/unit/neighbour.py", ["unit/test_page"]),
        ("tests/unit/test_page.py", ["unit/test_page"]),
        ("docs/page.md", ["unit/test_page"]),
        ("docs/other.md", ["unit/test_page"]),
        ("scripts/make_it.py", ["unit/test_script"]),
    ],
)
@pytest.mark.usefixtures("small_clone")
def test_what_a_file_can_affect(selection: ModuleType, changed: str, expected: list[str]):
    tests = [f"tests/{name}.py" for name in expected]
    assert selection.affected([changed]) == sorted([*tests, LINTERS])


@pytest.mark.parametrize(
    "changed",
    ["tests/conftest.py", "tests/helper.py", "pyproject.toml", "torchtitan/gone.py", "unknown.bin"],
)
@pytest.mark.usefixtures("small_clone")
def test_what_may_affect_all(selection: ModuleType, changed: str):
    everything = sorted(name for name in TREE if "test_" in name)
    assert selection.affected(["docs/page.md", changed]) == everything


def test_in_this_clone(selection: ModuleType):
    own = "tests/meta/test_changed.py"
    selected = selection.affected([own])
    assert own in selected and len(selected) == 1 + len(selection.ALWAYS)
    assert selection.affected(["tests/conftest.py"]) == selection.test_files()
    assert "tests/parity/test_table.py" in selection.affected(["torchtitan/models/registry.py"])


def test_uncommitted_files_are_found(selection: ModuleType, tmp_path: Path, monkeypatch):
    monkeypatch.setattr(selection, "ROOT", tmp_path)
    identity = ["-c", "user.name=a", "-c", "user.email=a@b"]
    (tmp_path / "kept").write_text("")
    (tmp_path / "edited").write_text("")
    for command in (["init", "-b", "main"], ["add", "."], [*identity, "commit", "-m", "first"]):
        assert selection.git(*command) or command[0] == "add"
    assert selection.changed_files() == []
    (tmp_path / "edited").write_text("now")
    (tmp_path / "new").write_text("")
    assert selection.changed_files() == ["edited", "new"]
