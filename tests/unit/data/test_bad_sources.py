"""Bad Parquet files, folders of C4 and Hugging Face, and datasets of one's own.

The numbers are those of the table of bad inputs.
"""

import gzip
import json
import re
import shutil
from collections.abc import Iterator
from pathlib import Path
from typing import Any

import datasets
import numpy as np
import pyarrow
import pyarrow.parquet
import pytest
import torch
from data_runs import Run, make_config, make_documents
from test_bad_data import ROWS, facts_for, only, read_all, write_rows
from torch.utils.data import IterableDataset

from torchtitan.config import DataError
from torchtitan.data import registry
from torchtitan.data.c4 import TEST_FOLDER
from torchtitan.data.registry import find_dataset, register_dataset
from torchtitan.preflight.data import check_environment as look
from torchtitan.preflight.data import check_static

TEXTS = make_documents(60)


@pytest.fixture(autouse=True)
def registered_only_here(monkeypatch):
    monkeypatch.setattr(registry.DATASETS, "_registered", dict(registry.DATASETS._registered))


def write_parquet(file: Path, **options: Any) -> Path:
    columns = options.pop("columns", {"text": TEXTS, "id": list(range(len(TEXTS)))})
    pyarrow.parquet.write_table(pyarrow.table(columns), file, **{"row_group_size": 8, **options})
    return file


# Parquet ---------------------------------------------------------------------------------------


@pytest.mark.parametrize(
    ("columns", "text"),
    [
        ({"body": TEXTS, "id": [1] * 60}, "no column 'text'; the columns are 'body', 'id'"),
        ({"text": [1.5] * 60, "body": TEXTS}, "holds double where text is expected; the columns"),
        ({"text": [[True]] * 60}, "holds list<"),
        ({"text": pyarrow.nulls(60)}, "column 'text' is null in every row"),
        ({"text": pyarrow.nulls(60, pyarrow.string())}, "column 'text' is null in all 60 rows"),
    ],
)
def test_row_56_text_column(tmp_path, columns, text):
    """Also in the last of many files: every footer is looked at."""
    if "all 60" not in text:
        write_parquet(tmp_path / "a.parquet")
    write_parquet(tmp_path / "b.parquet", columns=columns)
    for policy in ("error", "skip"):
        problem = only(look(facts_for(tmp_path, data__on_bad_row=policy)))
        assert problem.key == "data.text_column" and text in problem.problem
        assert problem.severity == "error" and "on_bad_row" not in problem.fix
    if "all 60" not in text:
        assert str(tmp_path / "b.parquet") in problem.problem
        with pytest.raises(DataError, match=r"b\.parquet: .*column"):
            read_all(tmp_path)


@pytest.mark.parametrize("damage", ["half", "no footer", "text"])
def test_row_58_footer(tmp_path, damage):
    whole = write_parquet(tmp_path / "a.parquet").read_bytes()
    broken = {"half": whole[: len(whole) // 2], "no footer": whole[:-8], "text": b"text " * 99}
    (tmp_path / "b.parquet").write_bytes(broken[damage])
    problem = only(look(facts_for(tmp_path)))
    assert problem.key == "training.dataset_path"
    assert f"{tmp_path / 'b.parquet'}: its Parquet footer cannot be read" in problem.problem


def test_row_58_damaged_row_group(tmp_path):
    """A row of its own in the count; the other row groups are read."""
    file = write_parquet(tmp_path / "a.parquet", compression="zstd", use_dictionary=False)
    whole, _ = read_all(file)
    content = bytearray(file.read_bytes())
    group = pyarrow.parquet.ParquetFile(file).metadata.row_group(3)
    start = group.column(0).data_page_offset
    end = start + group.column(0).total_compressed_size
    content[start + 30 : end] = bytes(end - start - 30)
    file.write_bytes(content)
    with pytest.raises(DataError, match=r"a\.parquet \(row 25\): row group 3 is damaged"):
        read_all(file)
    targets, last = read_all(file, on_bad_row="skip")
    assert last.bad_rows == 1 and 0.6 * whole < targets < whole


def test_rows_57_and_59(tmp_path):
    """Null, invalid UTF-8 and too long: left out one by one; their neighbours are read."""
    texts: list[bytes | None] = [text.encode() for text in TEXTS]
    texts[20:20] = [None, b"\xff\xfe", b"x" * 2000]
    values = pyarrow.array(texts, pyarrow.binary())
    file = write_parquet(tmp_path / "a.parquet", columns={"text": values})
    options = {"max_document_mib": 1e-3, "shuffle": False}
    with pytest.raises(DataError, match=r"a\.parquet \(row 21\): column 'text' holds null"):
        read_all(file, **options)
    targets, last = read_all(file, on_bad_row="skip", **options)
    assert last.bad_rows == 3
    assert targets == read_all(write_parquet(tmp_path / "b.parquet"))[0]


def test_row_59_invalid_utf8_in_a_column_of_text(tmp_path):
    """pyarrow does not look when it writes."""
    data = pyarrow.array([b"\xff", *[text.encode() for text in TEXTS]], pyarrow.binary())
    texts = pyarrow.Array.from_buffers(pyarrow.string(), len(data), data.buffers())
    file = write_parquet(tmp_path / "a.parquet", columns={"text": texts})
    assert read_all(file, on_bad_row="skip")[1].bad_rows == 1


def test_rows_54_and_55_parquet(tmp_path):
    assert (
        "holds no .parquet files"
        in only(look(facts_for(tmp_path, training__dataset="parquet"))).problem
    )
    write_parquet(tmp_path / "a.parquet", columns={"text": pyarrow.array([], pyarrow.string())})
    assert "hold no rows" in only(look(facts_for(tmp_path))).problem
    write_parquet(tmp_path / "a.parquet", columns={"text": TEXTS[:3]})
    problem = only(look(facts_for(tmp_path, lanes=4)))
    assert problem.key == "data.lanes" and "3 documents, too few for 4 lanes" in problem.problem
    with pytest.raises(DataError, match="too few documents"):
        Run(make_config(str(tmp_path), shuffle=False), num_lanes=4).step()
    write_rows(tmp_path / "b.jsonl")
    problem = only(look(facts_for(tmp_path)))
    assert "both JSON and Parquet" in problem.problem and '"parquet"' in problem.fix
    (tmp_path / "c.parquet.gz").write_bytes(b"x")
    assert "does not say" in only(look(facts_for(tmp_path / "c.parquet.gz"))).problem


@pytest.mark.parametrize("path", ["https://host/*.jsonl", "https://host/a.jsonl"])
def test_row_54_files_of_no_file_system(path):
    problem = only(look(facts_for(path)))
    assert "is no object store: download the files" in problem.problem
    assert not problem.missing_asset, "no machine has it"


def test_file_that_git_lfs_has_not_fetched(tmp_path):
    for name in ("a.parquet", "b.json.gz"):
        pointer = "version https://git-lfs.github.com/spec/v1\noid sha256:0\nsize 9\n"
        (tmp_path / name).write_text(pointer)
        assert "git lfs pull" in only(look(facts_for(tmp_path / name))).fix


# C4 --------------------------------------------------------------------------------------------


def test_test_set_is_in_c4s_layout():
    files = sorted((TEST_FOLDER / "en").iterdir())
    assert [file.name for file in files] == [
        *[f"c4-train.{n:05}-of-00004.json.gz" for n in range(4)],
        "c4-validation.00000-of-00001.json.gz",
    ]
    assert sum(file.stat().st_size for file in files) < 200_000
    lines = [line for file in files for line in gzip.decompress(file.read_bytes()).splitlines()]
    rows = [json.loads(line) for line in lines]
    assert len(rows) > 500
    for row in rows:
        assert list(row) == ["text", "timestamp", "url"] and len(row["text"]) >= 60


def test_c4_reads_its_splits_from_a_clone(tmp_path):
    english = tmp_path / "c4 [clone]" / "en"
    shutil.copytree(TEST_FOLDER / "en", english)
    (english.parent / "realnewslike").mkdir()
    shutil.copy(english / "c4-train.00000-of-00004.json.gz", english.parent / "realnewslike")

    def files_of(dataset: str, path: Path | None, **options: Any) -> list[str]:
        config = make_config(path and str(path), dataset=dataset, **options)
        source = registry.build_source(config.training, config.data)
        return [Path(file.path).name[:12] for file in source.files]  # type: ignore[attr-defined]

    assert files_of("c4", english.parent) == ["c4-train.000"] * 4
    assert files_of("c4", english) == ["c4-train.000"] * 4
    assert files_of("c4", english.parent, subset="realnewslike") == ["c4-train.000"]
    assert files_of("c4_validation", english.parent) == ["c4-validatio"]
    assert files_of("c4_test", None) == files_of("c4_mini", None) == ["c4-train.000"] * 4
    # A subset that is not there: neither those that are, nor their validation splits.
    problem = only(
        look(facts_for(english.parent, training__dataset="c4", data__subset="multilingual"))
    )
    assert "c4-train.*.json.gz, nor does multilingual/ in it" in problem.problem
    (english / "c4-validation.00000-of-00001.json.gz").unlink()
    problem = only(look(facts_for(english.parent, training__dataset="c4_validation")))
    assert "c4-validation.*.json.gz" in problem.problem and problem.missing_asset
    for name in ("c4_test", "c4"):
        path = str(TEST_FOLDER) if name == "c4" else None
        assert look(facts_for(path, training__dataset=name)) == []


# Folders of Hugging Face -----------------------------------------------------------------------


def test_local_folders(tmp_path):
    options: dict[str, Any] = {"training__dataset": "hf"}
    assert "needs it" in only(check_static(facts_for(None, **options))).problem
    problem = only(look(facts_for(tmp_path / "no", **options)))
    assert "is not a folder" in problem.problem and problem.missing_asset
    assert "no files of a known format" in only(look(facts_for(tmp_path, **options))).problem
    rows = datasets.Dataset.from_dict({"text": TEXTS, "id": range(60)})
    datasets.DatasetDict({"train": rows}).save_to_disk(tmp_path / "saved")
    saved = tmp_path / "saved"
    assert look(facts_for(saved, **options)) == []
    assert 'mean "train"' in only(look(facts_for(saved, data__split="tarin", **options))).fix
    problem = only(look(facts_for(saved, data__text_column="body", **options)))
    assert problem.key == "data.text_column" and "'text', 'id'" in problem.problem
    assert only(look(facts_for(saved, data__subset="en", **options))).key == "data.subset"
    next(saved.glob("train/*.arrow")).write_bytes(b"x")
    problem = only(look(facts_for(saved, **options)))
    assert problem.key == "training.dataset_path" and "cannot be read" in problem.problem


def test_row_64_folders_of_hugging_face_are_known_by_their_files(tmp_path):
    """As other files are: wherever the folder lies, by names and sizes."""
    rows = datasets.Dataset.from_dict({"text": TEXTS})
    for kind, streaming in (("files", True), ("files", False), ("saved", True)):
        prints = []
        for place in ("one", "two", "changed"):
            folder = tmp_path / f"{kind}-{streaming}-{place}" / "data"
            if kind == "saved":
                (rows if place != "changed" else rows.select(range(1, 60))).save_to_disk(folder)
            else:
                folder.mkdir(parents=True)
                write_rows(folder / "train.jsonl", ROWS[place == "changed" :])
            config = make_config(str(folder), dataset="hf", streaming=streaming)
            prints.append(Run(config, num_lanes=2).loaders[0].fingerprint)
        assert prints[0] == prints[1] != prints[2], (kind, streaming)


def test_places_in_other_data(tmp_path, monkeypatch):
    """What `checkpoint.allow_dataset_change` lets in: a cursor of Parquet means nothing to JSON."""
    monkeypatch.setattr("torchtitan.data.lanes._BLOCK_ROWS", 2)
    one_group = write_parquet(tmp_path / "a.parquet", row_group_size=60)
    parquet = Run(make_config(str(one_group)), num_lanes=2)
    parquet.step()
    while not all(state["cursor"] for state in parquet.lane_states.values()):
        parquet.step()
    states, before = parquet.lane_states, parquet.loaders[0].fingerprint
    assert all(state["shard"] == 0 for state in states.values())
    other = make_config(str(write_rows(tmp_path / "b.jsonl")))
    assert Run(other, num_lanes=2, lane_states=states, fingerprint=before).step().size
    same = Run(make_config(str(one_group)), num_lanes=2, lane_states=states, fingerprint=before)
    assert np.array_equal(same.step(), parquet.step())


def test_stream_that_breaks_off(tmp_path):
    """What fails inside of the library stops the run with one line, whatever on_bad_row says."""
    (tmp_path / "train.jsonl").write_text("\n".join([*ROWS, '{"text": ']) + "\n")
    message = r"reading failed after \d+ rows: ArrowInvalid: JSON parse error[^\n]*$"
    assert re.search(message, only(look(facts_for(tmp_path, training__dataset="hf"))).problem)
    with pytest.raises(DataError, match=message):
        read_all(tmp_path, dataset="hf", on_bad_row="skip")


def test_names_and_keys_of_the_hub():
    for name in ("hf:", "hf:a/b/c", "hf:a b", "hf:../x/y"):
        assert "not the id" in only(check_static(facts_for(None, training__dataset=name))).problem
    assert check_static(facts_for(None, training__dataset="hf:own/data", data__subset="en")) == []
    assert '"hf:own/data"' in only(check_static(facts_for(None, training__dataset="own/data"))).fix
    problem = only(check_static(facts_for("x", training__dataset="hf:own/data")))
    assert 'not used by "hf:own/data"' in problem.problem
    keys = {"subset": "en", "split": "test", "revision": "main", "streaming": False}
    for key, value in keys.items():
        context = facts_for("x", training__dataset="json", **{f"data__{key}": value})
        assert only(check_static(context)).key == f"data.{key}"
    assert (
        only(check_static(facts_for(None, training__dataset="c4", data__split="x"))).key
        == "data.split"
    )
    empty = facts_for(None, training__dataset="hf:own/data", data__revision="")
    assert "is empty" in only(check_static(empty)).problem
    assert find_dataset("hf:own/data") is not None
    with pytest.raises(ValueError, match="names a dataset of the hub"):
        register_dataset("hf:own/data", lambda training, data: [])


# Datasets of one's own -------------------------------------------------------------------------


class Stream(IterableDataset[Any]):
    """Gives `rows`, raising those that are errors."""

    def __init__(self, rows: list[Any], state: Any = None):
        self.rows = rows
        if state is not None:
            self.state_dict = lambda: state
            self.load_state_dict = lambda state: None

    def __iter__(self) -> Iterator[Any]:
        for row in self.rows:
            if isinstance(row, Exception):
                raise row
            yield row


class Mapped:
    def __init__(self, rows: list[Any]):
        self.rows = rows

    def __len__(self) -> int:
        return len(self.rows)

    def __getitem__(self, index: int) -> Any:
        if isinstance(self.rows[index], Exception):
            raise self.rows[index]
        return self.rows[index]


BAD = {
    "column": ({"body": "a"}, "there is no column 'text'; the columns are 'body'"),
    "null": ({"text": None}, "column 'text' holds null"),
    "number": (5, "the row holds a number where text is expected"),
    "floats": (torch.tensor([0.5]), "the row holds a Tensor where"),
    "negative": ([3, -1], "the row: element 1 is -1 where the number of a token is expected"),
    "unknown": ([3, 264], "token 264 is not one of the tokenizer's 264"),
    "long": ("x" * 2000, "more than data.max_document_mib"),
    "raises": (OSError("no such\nfile"), "reading it failed: OSError: no such"),
}


@pytest.mark.parametrize("kind", [Mapped, Stream])
@pytest.mark.parametrize("name", BAD)
def test_rows_56_57_59(kind, name):
    bad, text = BAD[name]
    rows = [*TEXTS[:20], bad, *TEXTS[20:]]
    register_dataset("own", lambda training, data: kind(rows))
    options = {"dataset": "own", "max_document_mib": 1e-3, "shuffle": False}
    if kind is Stream and name == "raises":
        # Nothing tells whether more would follow.
        text = "reading failed after 20 rows: OSError: no such"
        with pytest.raises(DataError, match=text):
            read_own(on_bad_row="skip", **options)
        return
    with pytest.raises(DataError) as error:
        read_own(**options)
    place = "own[20]" if kind is Mapped else "own (row 21)"
    assert str(error.value).startswith(f"{place}: ") and text in str(error.value)
    targets, last = read_own(on_bad_row="skip", **options)
    assert last.bad_rows == 1
    rows.remove(bad)
    assert read_own(**options)[0] == targets


def read_own(**options: Any) -> Any:
    """`read_all` without a path."""
    run = Run(make_config(None, epochs=1, **options), num_lanes=2)
    targets = 0
    while not (step := run.loaders[0].next_step()).ended:
        targets += sum(int((batch["labels"] >= 0).sum()) for batch in step.microbatches)
    return targets, step


def test_factories_that_make_nothing_to_read():
    def problem_of(made: Any, **options: Any) -> str:
        registry.DATASETS._registered.pop("own", None)
        register_dataset("own", lambda training, data: made)
        return str(only(look(facts_for(None, training__dataset="own", **options))))

    assert "cannot be read again" in problem_of(iter(TEXTS))
    assert "a NoneType, which cannot" in problem_of(None)
    assert "has no length" in problem_of(torch.utils.data.Dataset())
    assert "too few for 4 lanes" in problem_of(TEXTS[:3], lanes=4)
    assert "3 documents, too few for 4 lanes" in problem_of(Stream(TEXTS[:3]), lanes=4)
    assert "hold no text" in problem_of([""] * 60)
    workers = {"training__dataloader": {"num_workers": 2}}
    unsendable = Stream(TEXTS)
    unsendable.note = lambda: None  # type: ignore[attr-defined]
    problem = problem_of(unsendable, **workers)
    assert "num_workers" in problem and "cannot be sent to worker processes" in problem


def test_state_that_cannot_be_stored(monkeypatch):
    monkeypatch.setattr("torchtitan.data.lanes._BLOCK_ROWS", 5)
    for state in ({"at": {1, 2}}, {"at": object()}, {"at": torch.ones(1, dtype=torch.bfloat16)}):
        registry.DATASETS._registered.pop("own", None)
        register_dataset("own", lambda training, data, state=state: Stream(TEXTS, state))
        with pytest.raises(DataError, match="cannot be stored"):
            read_own(dataset="own")


def test_too_many_tensors_for_reading_processes():
    register_dataset("own", lambda training, data: [torch.tensor([n % 99]) for n in range(2000)])
    run = Run(make_config(None, dataset="own", num_workers=1), num_lanes=2)
    with pytest.raises(DataError, match="too many tensors"):
        run.step()
    run.close()
