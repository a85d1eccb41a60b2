"""Data that look wrong and are not: folders of other programs beside them, fewer than the lanes."""

import gzip
import json
from pathlib import Path

import numpy as np
import pytest
from data_runs import Run, make_config
from test_bad_data import facts_for

from torchtitan.data.lanes import _blocks
from torchtitan.data.listing import list_files
from torchtitan.data.pieces import cut_text
from torchtitan.data.reading import ShardRows
from torchtitan.data.registry import build_source
from torchtitan.preflight.data import check_environment


def test_folders_of_other_programs_are_not_read(tmp_path):
    for name in ("a.txt", "in/b", ".git/c", "in/.cache/d.txt", "_tmp/e.txt", ".f.txt"):
        (tmp_path / name).parent.mkdir(exist_ok=True, parents=True)
        (tmp_path / name).write_text("words")
    files = list_files(str(tmp_path), "text").files
    assert [Path(file.path).name for file in files] == ["a.txt", "b"]
    files = list_files(str(tmp_path), "auto").files
    assert [Path(file.path).name for file in files] == ["a.txt"]
    files = list_files(str(tmp_path / "in" / ".cache"), "auto").files  # asked for by name
    assert [Path(file.path).name for file in files] == ["d.txt"]


def test_a_lane_without_a_document_in_one_epoch_goes_on(tmp_path):
    """Two documents in each of three files for four lanes: half of the shards are empty."""
    for name in "abc":
        rows = [json.dumps({"text": f"<{name} {n}>"}) for n in range(2)]
        (tmp_path / f"{name}.json.gz").write_bytes(gzip.compress("\n".join(rows).encode()))
    assert check_environment(facts_for(tmp_path, lanes=4)) == []
    run = Run(make_config(str(tmp_path)), num_lanes=4)
    states = []
    whole = []
    for _ in range(60):
        whole.append(run.step())
        states.append(run.lane_states)
    again = Run(make_config(str(tmp_path)), dp=2, num_lanes=4, lane_states=states[20])
    assert all(np.array_equal(again.step(), step) for step in whole[21:40])
    epochs = [state["epoch"] for state in states[-1].values()]
    assert min(epochs) > 20 and len(set(epochs)) > 1


@pytest.mark.parametrize(
    ("line", "ends"),
    [("x" * 10_000 + "\n", "\n"), (("x" * 9_999 + " ") * 30 + "\n", " \n"), ("x" * 300_000, "x")],
    ids=["line ends", "blanks", "anywhere"],
)
def test_text_is_cut_where_it_hurts_least(tmp_path, line, ends):
    """At a line end within 64 KiB, else at a blank, else anywhere."""
    content = line * (4_000_000 // len(line))
    (tmp_path / "a.txt").write_text(content)
    files = list_files(str(tmp_path), "text").files
    shards = cut_text(files, [0], files[0].size // 16, b"")
    assert len(shards) == 16 and shards[-1].end == len(content)
    assert {content[shard.end - 1] for shard in shards[:-1]} == {*ends}


def test_blocks_do_not_depend_on_the_limit_on_documents(tmp_path, monkeypatch):
    """A run that has met a row too long goes on at its place with a larger limit."""
    monkeypatch.setattr("torchtitan.data.lanes._BLOCK_BYTES", 5000)
    rows = [{"text": f"<{n}> " + "x" * (2**21 if n == 30 else 100)} for n in range(60)]
    file = tmp_path / "a.jsonl.gz"
    file.write_bytes(gzip.compress("\n".join(map(json.dumps, rows)).encode()))
    sizes = []
    for mib in (1e-3, 64.0):
        config = make_config(str(file), max_document_mib=mib)
        source = build_source(config.training, config.data)
        shard = source.shards(1)[0]
        blocks = _blocks(ShardRows(source, shard), shard, "")
        sizes.append([len(block) for _, block in blocks])
    assert sizes[0] == sizes[1] == [31, 29]
