"""Streams of the hub: files as people have them, and answers that break off."""

import gzip
import io
import json
import os
import sys
from pathlib import Path
from typing import Any

import pyarrow
import pyarrow.parquet
import pytest
import zstandard

import torchtitan
from tests.forked import execute
from tests.unit.hub_server import Hub, Repository


def rows(name: str, count: int = 30) -> list[dict[str, Any]]:
    return [{"text": f"<{name} {n}> wörds 数学"} for n in range(count)]


def lines(items: list[Any], end: str = "\n", last: str = "\n") -> bytes:
    return (end.join(json.dumps(item, ensure_ascii=False) for item in items) + last).encode()


def parquet(items: list[Any]) -> bytes:
    file = io.BytesIO()
    pyarrow.parquet.write_table(pyarrow.Table.from_pylist(items), file, row_group_size=100)
    return file.getvalue()


def halves(content: bytes) -> list[bytes]:
    middle = len(content) // 2 + 1
    return [content[:middle], content[middle:]]


FILES = {
    "members.jsonl.gz": b"".join(map(gzip.compress, halves(lines(rows("members"))))),
    "frames.jsonl.zst": b"".join(
        zstandard.ZstdCompressor().compress(half) for half in halves(lines(rows("frames")))
    ),
    "bom.jsonl": b"\xef\xbb\xbf" + lines(rows("bom")),
    "crlf.jsonl": lines(rows("crlf"), "\r\n"),
    "blank.jsonl": lines(rows("blank"), "\n\n"),
    "unended.jsonl": lines(rows("unended"), last=""),
    "nested.jsonl": lines([row | {"meta": {"a": [{"b": 1}]}} for row in rows("nested")]),
    "kinds.jsonl": lines([row | {"n": n if n % 2 else "n"} for n, row in enumerate(rows("kinds"))]),
    "columns.jsonl": lines([row | {"n": 1} if n % 2 else row for n, row in enumerate(rows("c"))]),
    "array.json": json.dumps(rows("array"), indent=1).encode(),
    "huge.jsonl": lines([*rows("huge"), {"text": "x" * (11 << 20)}]),
}
LONG = {
    "long.jsonl": lines(rows("long", 900)),
    "long.jsonl.gz": gzip.compress(lines(rows("long.gz", 900))),
    "long.parquet": parquet(rows("long.pq", 900)),
    "slow.jsonl": lines(rows("slow", 900)),
    "gone.jsonl": lines(rows("gone", 900)),
}
CUTS = [
    *(("long.jsonl", size, 0.0) for size in (9000, 0, 0, 20, 0, 0)),
    *(("long.jsonl.gz", size, 0.0) for size in (3000, 0, 0, 0, 0, 5000)),
    *(("long.parquet", size, 0.0) for size in (10, 0, 0)),
    ("slow.jsonl", 5000, 3.0),
    *[("gone.jsonl", 0, 0.0)] * 200,
]
SCRIPT = """
import json, logging, os, sys, time, urllib.request
sys.path[:0] = {folders!r}
time.sleep = lambda seconds: None
from data_runs import make_config
from torchtitan.config import DataError
from torchtitan.data.reading import ShardRows
from torchtitan.data.sources_hub import hub_source

warnings = []
handler = logging.Handler()
handler.emit = lambda record: warnings.append(record.getMessage())
logging.getLogger("torchtitan").addHandler(handler)

def fail(when):
    try:
        urllib.request.urlopen(os.environ["HF_ENDPOINT"] + "/fail/" + when)
    except urllib.error.HTTPError:
        pass

def read(name):
    fail("off")  # what a start reads is not read again: the command is
    config = make_config(None, dataset="hf:" + name)
    source = hub_source(name, config.training, config.data)
    shards = source.shards(2)
    fail("on")
    try:
        rows = [row for shard in shards for row in ShardRows(source, shard, retries=5)]
    except DataError as error:
        return str(error), warnings
    return sorted(map(source.text, rows)), warnings

print(json.dumps({{name: read(name) for name in {names!r}}}))
"""


@pytest.fixture(scope="module")
def answers(tmp_path_factory: pytest.TempPathFactory) -> dict[str, Any]:
    """Texts and warnings of each file, each a dataset; in one process, for importing takes long."""
    home = tmp_path_factory.mktemp("hub")
    named = {f"odd/{name}": content for name, content in FILES.items()}
    named |= {f"long/{name}": content for name, content in LONG.items()}
    repositories = {
        name: Repository({f"data/train-0{name.partition('/')[2]}": content})
        for name, content in named.items()
    }
    parts = {"data/0.jsonl": lines(rows("parts")), "data/1.jsonl": b"", "data/2.jsonl": b"\n"}
    repositories["odd/parts"] = Repository(parts)
    folders = [str(Path(__file__).parent), str(Path(torchtitan.__file__).parents[1])]
    with Hub(repositories) as hub:
        hub.cut_answers += [(f"/{name}/", size, seconds) for name, size, seconds in CUTS]
        known = {"HF_HOME": str(home), "HF_ENDPOINT": hub.url, "HF_HUB_DOWNLOAD_TIMEOUT": "1"}
        script = SCRIPT.format(folders=folders, names=[*repositories])
        done = execute([sys.executable, "-c", script], {**os.environ, **known}, home)
        assert done.returncode == 0, done.stderr
        # All others were asked for.
        assert {part for part, *_ in hub.cut_answers} == {"/gone.jsonl/"}
    found: dict[str, Any] = json.loads(done.stdout.splitlines()[-1])
    return found


@pytest.mark.parametrize("name", FILES)
def test_files_of_people_are_read_to_the_last_row(answers, name):
    texts, warnings = answers[f"odd/{name}"]
    count = len(texts) - (name == "huge.jsonl")
    tag = "c" if name == "columns.jsonl" else name.partition(".")[0]
    assert count == 30 and warnings == []
    assert set(texts) >= {row["text"] for row in rows(tag)}
    assert name != "huge.jsonl" or len(texts[-1]) == 11 << 20


def test_empty_parts_are_passed_over(answers):
    assert answers["odd/parts"][0] == sorted(row["text"] for row in rows("parts"))


@pytest.mark.parametrize(
    ("name", "tag"),
    [
        ("long.jsonl", "long"),
        ("long.jsonl.gz", "long.gz"),
        ("long.parquet", "long.pq"),
        ("slow.jsonl", "slow"),
    ],
)
def test_answers_that_break_off_lose_no_row(answers, name, tag):
    assert answers[f"long/{name}"][0] == sorted(row["text"] for row in rows(tag, 900))


def test_what_the_library_has_tried_is_not_tried_again(answers):
    """It tries for minutes, in which other ranks would give up."""
    message, warnings = answers["long/gone.jsonl"]
    assert message.startswith("long/gone.jsonl: reading failed after 0 rows: ConnectionError")
    assert warnings == []
