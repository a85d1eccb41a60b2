"""Which files are read, what is said of those that are not, and why a path cannot be."""

import json
import os
import shutil

import pytest
from data_runs import Run, make_config
from test_bad_data import ROWS, facts_for, only, write_rows

from torchtitan.commands.train import describe_data
from torchtitan.data import identity, listing, loader
from torchtitan.data.files import DataFile
from torchtitan.data.identity import content_digests, differences, fingerprint_of
from torchtitan.data.listing import list_files
from torchtitan.preflight.data import check_environment
from torchtitan.utils.text import format_bytes


@pytest.fixture
def folder(tmp_path):
    for place in ("sub", ".git/objects", "_lang=en"):
        (tmp_path / "data" / place).mkdir(parents=True)
    write_rows(tmp_path / "data" / "a.jsonl")
    write_rows(tmp_path / "data" / "sub" / "b.jsonl", ROWS[:9])
    return tmp_path / "data"


def described(path, **changes):
    return describe_data(facts_for(path, **changes))


def test_a_line_says_what_is_read_and_what_is_left_out(folder, tmp_path):
    size = format_bytes(sum((folder / name).stat().st_size for name in ("a.jsonl", "sub/b.jsonl")))
    line, ends = described(folder)
    assert line.startswith(f"training data ({folder}): 2 files, {size}; left out: 2 beginning with")
    assert ends == "each document is <start> TEXT <end>"
    for name in ("README.md", "x.data", ".hidden.jsonl", "_lang=en/c.jsonl", ".git/objects/1"):
        (folder / name).write_text("{}")
    (folder / "empty.jsonl").touch()
    os.mkfifo(folder / "fifo.jsonl")
    (tmp_path / "elsewhere").mkdir()
    write_rows(tmp_path / "elsewhere" / "d.jsonl")
    (folder / "linked").symlink_to(tmp_path / "elsewhere")
    line, _ = described(folder)
    head, _, left_out = line.partition("; left out: ")
    assert head == f"training data ({folder}): 2 files, {size}"
    assert "1 empty (empty.jsonl)" in left_out
    assert "1 not regular (fifo.jsonl)" in left_out
    assert "1 links to folders (linked/)" in left_out
    for part in ("2 of another kind (", ".md", ".data", "3 beginning with", ".git/"):
        assert part in left_out
    assert "_lang=en/" in left_out and ".hidden.jsonl" in left_out


def test_a_run_says_it_too(folder, caplog):
    caplog.set_level("INFO", "torchtitan")
    (folder / "README.md").write_text("words")
    Run(make_config(str(folder)))
    assert f"Reads training data ({folder}): 2 files" in caplog.text
    assert ", 1 of another kind (.md)" in caplog.text
    assert "each document is <start> TEXT <end>" in caplog.text


def test_a_folder_is_listed_once_in_a_check(folder, monkeypatch):
    scans = []
    scan = listing._scan
    monkeypatch.setattr(listing, "_scan", lambda *names: [scans.append(names), scan(*names)][1])
    with listing.listed_once():
        assert check_environment(facts_for(folder)) == []
        described(folder)
    assert len(scans) == 2  # the folder and the one in it
    described(folder)
    assert len(scans) == 4


@pytest.mark.parametrize("level", ["INFO", "WARNING"])
def test_only_a_rank_that_logs_describes_what_it_reads(folder, monkeypatch, caplog, level):
    caplog.set_level(level, "torchtitan")
    asked: list[int] = []
    monkeypatch.setattr(loader, "describe_source", lambda *_: asked.append(1) or "it all")
    Run(make_config(str(folder)), num_lanes=1)
    assert bool(asked) == ("Reads it all" in caplog.text) == (level == "INFO")


def test_documents_are_counted_where_that_is_cheap(tmp_path):
    import pyarrow
    from pyarrow import parquet

    parquet.write_table(pyarrow.table({"text": ["a b c"] * 123}), tmp_path / "a.parquet")
    assert ", 123 documents" in described(tmp_path)[0]
    assert described(None, training__dataset="stdlib")[0].startswith("training data (stdlib): ")


@pytest.mark.parametrize("name", ["b.jsonl.lz4", "b.jsonl.7z"])
def test_data_that_are_packed_otherwise_do_not_go_missing(folder, name):
    (folder / name).write_text("x")
    assert f"{folder / name} is packed as" in only(check_environment(facts_for(folder))).problem
    os.rename(folder / name, folder / "b.txt.lz4")  # of another kind
    assert check_environment(facts_for(folder, training__dataset="json")) == []


def test_the_same_documents_twice(folder):
    copy, link, packed = folder / "sub" / "copy.jsonl", folder / "link.jsonl", folder / "a.jsonl.gz"
    shutil.copy(folder / "a.jsonl", copy)
    problem = only(check_environment(facts_for(folder)))
    assert problem.severity == "warning" and f"{folder / 'a.jsonl'} and {copy}" in problem.problem
    os.remove(copy)
    os.link(folder / "a.jsonl", link)
    assert f"{folder / 'a.jsonl'} and {link}" in only(check_environment(facts_for(folder))).problem
    os.remove(link)
    import gzip

    packed.write_bytes(gzip.compress((folder / "a.jsonl").read_bytes()))
    assert (
        f"{folder / 'a.jsonl'} and {packed}" in only(check_environment(facts_for(folder))).problem
    )
    os.remove(packed)
    assert check_environment(facts_for(folder)) == []
    (folder / "big.jsonl").write_bytes((folder / "a.jsonl").read_bytes() * 400)
    shutil.copy(folder / "a.jsonl", copy)  # small, as many are that source code has
    assert check_environment(facts_for(folder)) == []
    assert (
        check_environment(facts_for(None, training__dataset="stdlib")) == []
    )  # some of whose files are equal


def test_wrong_paths_are_told_apart(tmp_path):
    (tmp_path / "one").symlink_to("two")
    (tmp_path / "two").symlink_to("one")
    (tmp_path / "nowhere").symlink_to("absent.jsonl")
    os.mkfifo(tmp_path / "fifo")
    (tmp_path / "in").mkdir()
    (tmp_path / "in" / "loop.jsonl").symlink_to("loop.jsonl")
    for path, text in (
        ("one", "Too many levels of symbolic links"),
        ("nowhere", "is a link to absent.jsonl, which does not exist"),
        ("fifo", "is neither a file nor a folder"),
        ("in", "Too many levels of symbolic links"),
        ("absent", "does not exist"),
    ):
        assert text in only(check_environment(facts_for(tmp_path / path))).problem, path


def test_a_long_listing_says_how_far_it_is(tmp_path, monkeypatch, capsys):
    monkeypatch.setattr(listing, "_SILENT_SECONDS", 0.0)
    for number in range(1030):
        (tmp_path / f"{number}.txt").write_text("x")
    assert len(list_files(str(tmp_path), "text").files) == 1030
    assert f"listing {tmp_path}: 1,024 files so far" in capsys.readouterr().err


# Content ---------------------------------------------------------------------------------------


def other_content(file, at):
    """Change one letter in place."""
    content = bytearray(file.read_bytes())
    content[at] ^= 1
    file.write_bytes(content)


def fingerprint(folder):
    return Run(make_config(str(folder))).loaders[0].fingerprint


def test_other_content_of_the_same_size_is_other_data(folder):
    before = fingerprint(folder)
    assert fingerprint(folder) == before
    os.utime(folder / "a.jsonl")  # a copy has another time
    assert fingerprint(folder) == before
    other_content(folder / "a.jsonl", (folder / "a.jsonl").stat().st_size // 2)
    assert fingerprint(folder) != before


def test_large_files_are_sampled(tmp_path, monkeypatch):
    monkeypatch.setattr(identity, "_WHOLE_BYTES", 10)
    file = tmp_path / "a.bin"
    size = 4 * identity._MOST_BLOCKS * identity._BLOCK_BYTES
    file.write_bytes(bytes(size))
    digests = [content_digests([DataFile(str(file), size)])]
    for at in (0, size - 1, (size - 4096) * 20 // 63 + 7):
        other_content(file, at)
        digests.append(content_digests([DataFile(str(file), size)]))
    assert len({digest for (digest,) in digests}) == 4
    other_content(file, 5000)  # between two samples
    assert content_digests([DataFile(str(file), size)]) == digests[-1]


def test_files_are_not_called_changed_because_they_are_sampled_otherwise(folder, monkeypatch):
    """What a file is sampled by depends on the others."""
    before = Run(make_config(str(folder))).loaders[0].data_summary
    monkeypatch.setattr(identity, "_WHOLE_BYTES", 10)
    monkeypatch.setattr(identity, "_BLOCK_BYTES", 8)
    write_rows(folder / "new.jsonl")
    after = Run(make_config(str(folder))).loaders[0].data_summary
    assert differences(before, after) == {"training.dataset_path": "new.jsonl is new"}


def test_changes_among_many_files_are_told_by_more_than_their_number(folder, monkeypatch):
    monkeypatch.setattr(identity, "_MAX_FILES", 1)
    before = Run(make_config(str(folder))).loaders[0].data_summary
    other_content(folder / "a.jsonl", 20)
    found = differences(before, Run(make_config(str(folder))).loaders[0].data_summary)
    assert "some of the 2 files of" in found["training.dataset_path"]


def test_a_checkpoint_from_before_the_digests_is_accepted(folder):
    """With its cursors, which only mean something in the same data."""
    run = Run(make_config(str(folder)))
    context = json.loads(json.dumps(run.loaders[0].data_facts))
    context["data"]["files"] = [entry[:2] for entry in context["data"]["files"]]
    former = fingerprint_of(context)
    assert differences(run.loaders[0].data_summary, run.loaders[0].data_summary) == {}
    assert former != run.loaders[0].fingerprint
    assert run.loaders[0].names_data(former) and run.loaders[0].names_data(None)
    assert not run.loaders[0].names_data("other")
