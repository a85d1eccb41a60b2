"""docs/reference/ is what scripts/make_reference.py would write now; all metrics are documented."""

import ast
import re
import sys
from pathlib import Path

import pytest

ROOT = Path(__file__).parents[2]
sys.path.insert(0, str(ROOT / "scripts"))
import make_messages  # noqa: E402
import make_reference  # noqa: E402

from torchtitan.metrics.sinks import TENSORBOARD_TAGS  # noqa: E402


@pytest.mark.parametrize("name", make_reference.PAGES)
def test_page_is_current(name: str):
    page = (make_reference.FOLDER / name).read_text(encoding="utf-8")
    assert page == make_reference.PAGES[name](), "run scripts/make_reference.py"


def messages(tmp_path: Path, source: str) -> list[tuple[str, str]]:
    folder = tmp_path / "package"
    folder.mkdir()
    (folder / "module.py").write_text(source)
    reader = make_messages.Reader(folder)
    found = reader.messages(reader.modules["package.module"])
    return [(message.kind + message.text, message.fix) for message in found]


def test_names_are_followed_to_their_strings(tmp_path: Path):
    source = '''
KEY = "job.dump_folder"
WAYS = "choose another"

def check(path, full):
    """A docstring is no message at all."""
    problem = f"{path} holds another run"
    if full:
        problem = "is full of old files"
    yield ConfigIssue(KEY, problem, f"{WAYS}, or remove it")

def refuse(what):
    raise ValueError(f"cannot read {what}. Fix: get it again")

def read():
    logger.warning("row %d is left out: %s", 5, "x")
    refuse("the whole file")
    return "and this is handed on"
'''
    fix = "choose another, or remove it"
    assert messages(tmp_path, source) == [
        ("error: `job.dump_folder`: … holds another run", fix),
        ("error: `job.dump_folder`: is full of old files", fix),
        ("error: cannot read …", "get it again"),
        ("warning: row … is left out: …", ""),
        ("error: cannot read the whole file", "get it again"),
        ("… and this is handed on", ""),
    ]


def test_messages_that_users_have_met_are_found():
    """A part of each, as somebody would look for it; from all rooms and kinds."""
    page = (make_reference.FOLDER / "messages.md").read_text(encoding="utf-8")
    page = re.sub(r"\\(.)", r"\1", page)
    for part in (
        "does not divide training.local_batch_size = …",
        "is not a multiple of training.local_batch_size x data-parallel degree = …",
        "has no manifest, so damage would not be noticed",
        "is not a command",
        "cannot be combined with",
        "another job is using it",
    ):
        assert part in page, part


def record_keys() -> set[str]:
    """The keys of records that the code of metrics writes, `NAME` for what is named at run time."""
    metrics, found = ROOT / "torchtitan" / "metrics", set(TENSORBOARD_TAGS)
    for node in (
        node
        for name in ("logger.py", "rank_times.py", "goodput.py")
        for node in ast.walk(ast.parse((metrics / name).read_text()))
    ):
        keys = node.keys if isinstance(node, ast.Dict) else []
        if isinstance(node, ast.Subscript) and getattr(node.value, "id", "") == "record":
            keys = [node.slice]
        found |= {key.value for key in keys if isinstance(key, ast.Constant)}
    return found


def test_every_key_of_a_record_is_in_the_page_of_metrics_with_its_tag():
    page = (ROOT / "docs" / "guides" / "metrics.md").read_text(encoding="utf-8")
    keys = record_keys()
    assert {"loss", "own_seconds/median", "num_ooms"} <= keys
    assert sorted(key for key in keys if f"`{key}`" not in page) == []
    assert sorted(tag for tag in TENSORBOARD_TAGS.values() if f"`{tag}" not in page) == []
