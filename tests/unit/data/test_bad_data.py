"""Bad data and tokenizers: refused before the run where that can be known, else with file and row.

The numbers are those of the table of bad inputs.
"""

import gzip
import json
import os
import random
from pathlib import Path

import pytest
import zstandard
from data_runs import Run, make_config, make_documents
from test_tokenizers import write_tokenizer
from tokenizers import normalizers

from torchtitan.config import ConfigError, DataError, JobConfig
from torchtitan.config.run_context import RunContext
from torchtitan.data.tokenizers import build_tokenizer
from torchtitan.preflight.data import check_environment as look
from torchtitan.preflight.data import check_static

ROWS = [json.dumps({"text": text, "id": n}) for n, text in enumerate(make_documents(60))]


def facts_for(path, dp=1, lanes=None, **options):
    """RunContext of a small run; `options` are dotted keys with __ for the dot."""
    training = {"dataset_path": path and str(path), "seq_len": 16, "local_batch_size": 4}
    tables = {"training": training, "data": {"lanes": lanes}}
    for name, value in options.items():
        *parts, key = name.split("__")
        place = tables
        for part in parts:
            place = place.setdefault(part, {})
        place[key] = value
    return RunContext(JobConfig.model_validate(tables), dp, "cpu")


def only(problems):
    (problem,) = problems
    return problem


def write_rows(file: Path, rows=ROWS) -> Path:
    lines = (row if isinstance(row, bytes) else row.encode() for row in rows)
    file.write_bytes(b"".join(line + b"\n" for line in lines))
    return file


def read_all(path, dataset="auto", **data):
    """One pass over the data: the number of targets, and the last step's data."""
    run = Run(make_config(str(path), dataset=dataset, **({"epochs": 1} | data)), num_lanes=2)
    targets = 0
    try:
        while not (step := run.loaders[0].next_step()).ended:
            targets += sum(int((batch["labels"] >= 0).sum()) for batch in step.microbatches)
    finally:
        run.close()
    return targets, step


# Tokenizer -------------------------------------------------------------------------------------


def test_row_47_no_tokenizer(tmp_path):
    data = write_rows(tmp_path / "a.jsonl")
    problem = only(look(facts_for(data, model__tokenizer_path=str(tmp_path / "none"))))
    assert problem.missing_asset and "tokenizer.json" in problem.problem


def test_row_48_corrupt_tokenizer(tmp_path):
    data = write_rows(tmp_path / "a.jsonl")
    (tmp_path / "tokenizer.json").write_text("{")
    problem = only(look(facts_for(data, model__tokenizer_path=str(tmp_path))))
    assert "not a readable tokenizer" in problem.problem and not problem.missing_asset


def test_row_49_no_end_token(tmp_path):
    data = write_rows(tmp_path / "a.jsonl")
    write_tokenizer(tmp_path, specials=("<odd>",))
    problem = only(look(facts_for(data, model__tokenizer_path=str(tmp_path))))
    assert "no end-of-text token" in problem.problem


def test_row_50_round_trip(tmp_path):
    data = write_rows(tmp_path / "a.jsonl")
    library = write_tokenizer(tmp_path)
    assert look(facts_for(data, model__tokenizer_path=str(tmp_path))) == []
    library.normalizer = normalizers.Lowercase()
    library.save(str(tmp_path / "tokenizer.json"))
    problem = only(look(facts_for(data, model__tokenizer_path=str(tmp_path))))
    assert problem.severity == "warning" and "becomes" in problem.problem


def test_tokenizer_that_the_model_does_not_fit(tmp_path):
    data = write_rows(tmp_path / "a.jsonl")
    problem = only(look(facts_for(data, model__args={"vocab_size": 100})))
    assert problem.key == "model.args.vocab_size" and "tokenizer's 264" in problem.problem
    assert look(facts_for(data, model__args={"vocab_size": 264})) == []
    # The model's own check tells these.
    assert look(facts_for(data, model__args={"vocab_size": 100, "depth": 1})) == []
    assert look(facts_for(data, model__flavor="9B")) == []


# Finding the data ------------------------------------------------------------------------------


def test_row_53_unknown_dataset():
    problem = only(check_static(facts_for(None, training__dataset="stdlb")))
    assert problem.key == "training.dataset" and 'did you mean "stdlib"' in problem.fix


def test_dataset_and_path_must_fit_together(tmp_path):
    assert "needs it" in only(check_static(facts_for(None))).problem
    assert only(check_static(facts_for(None))).key == "training.dataset_path"
    assert check_static(facts_for(None, training__dataset="stdlib")) == []
    with_path = facts_for(tmp_path, training__dataset="stdlib")
    assert 'not used by "stdlib"' in only(check_static(with_path)).problem
    assert "not a path" in only(check_static(facts_for("a\0b"))).problem


def test_row_54_missing(tmp_path):
    for path, text in ((tmp_path / "no.jsonl", "does not exist"), (tmp_path / "*.gz", "no file")):
        problem = only(look(facts_for(path)))
        assert problem.missing_asset and problem.key == "training.dataset_path"
        assert text in problem.problem and str(tmp_path) in problem.problem
    assert "the folder holds no" in only(look(facts_for(tmp_path))).problem


def test_row_54_same_file_twice(tmp_path):
    write_rows(tmp_path / "a.jsonl")
    os.symlink(tmp_path / "a.jsonl", tmp_path / "b.jsonl")
    problem = only(look(facts_for(tmp_path)))
    assert "a.jsonl" in problem.problem and "b.jsonl are the same file" in problem.problem


def test_row_54_kind_unclear(tmp_path):
    write_rows(tmp_path / "a.jsonl")
    (tmp_path / "b.txt").write_text("text " * 1000)
    assert "both JSON and text" in only(look(facts_for(tmp_path))).problem
    (tmp_path / "c.data").write_text("text " * 10000)
    assert "does not say" in only(look(facts_for(tmp_path / "c.data"))).problem
    assert look(facts_for(tmp_path / "c.data", training__dataset="text")) == []


def test_row_54_unreadable(tmp_path):
    if os.geteuid() == 0:
        pytest.skip("root may read everything")
    file = write_rows(tmp_path / "a.jsonl")
    file.chmod(0)
    assert "no permission" in only(look(facts_for(file))).problem


# Enough data -----------------------------------------------------------------------------------


def test_row_55_empty(tmp_path):
    (tmp_path / "a.jsonl").touch()
    (tmp_path / "b.jsonl").touch()
    assert "all 2 files are empty" in only(look(facts_for(tmp_path))).problem
    write_rows(tmp_path / "a.jsonl", ['{"text": ""}'] * 20)
    assert "hold no text" in only(look(facts_for(tmp_path, lanes=1))).problem


def test_row_55_too_few_documents(tmp_path):
    file = write_rows(tmp_path / "a.jsonl", ROWS[:3])
    problem = only(look(facts_for(file, lanes=4)))
    assert problem.key == "data.lanes" and "3 documents" in problem.problem
    assert "4 lanes" in problem.problem and "at most 3" in problem.fix
    with pytest.raises(DataError, match="too few documents"):
        Run(make_config(str(file), shuffle=False), num_lanes=4).step()


def test_row_55_too_few_pieces_of_text(tmp_path):
    (tmp_path / "a.txt").write_text("some words\n" * 900)
    problem = only(look(facts_for(tmp_path / "a.txt", lanes=4)))
    assert problem.key == "data.lanes" and "2 parts, too few for 4 lanes" in problem.problem
    with pytest.raises(ConfigError, match="2 parts"):
        Run(make_config(str(tmp_path / "a.txt")), num_lanes=4)


def test_row_55_less_than_one_step(tmp_path):
    file = write_rows(tmp_path / "a.jsonl")
    problem = only(look(facts_for(file, data__epochs=2, training__seq_len=16384)))
    size = file.stat().st_size
    assert f"2 x {size} bytes" in problem.problem and "a step takes 4" in problem.problem
    assert look(facts_for(file, training__seq_len=16384)) == []


# Rows ------------------------------------------------------------------------------------------


@pytest.mark.parametrize(
    ("row", "text"),
    [
        ('{"content": "a", "id": 1}', "no column 'text'; the columns are 'content', 'id'"),
        ('{"text": 5}', "column 'text' holds a number where text is expected"),
        ('{"text": null}', "column 'text' holds null where text is expected"),
    ],
)
def test_row_56_text_column(tmp_path, row, text):
    problem = only(look(facts_for(write_rows(tmp_path / "a.jsonl", [row] * 20), lanes=1)))
    assert problem.key == "data.text_column" and problem.value == "text"
    assert text in problem.problem and "a.jsonl:1 (byte 0)" in problem.problem
    # With rows to leave out, a file without a single usable row is still refused.
    skipping = facts_for(tmp_path / "a.jsonl", lanes=1, data__on_bad_row="skip")
    assert text in only(look(skipping)).problem


BAD_ROWS = {
    "syntax": (b'{"text": "cut', "invalid JSON"),
    "text row": (b'"text"', "expected a JSON object, found text"),
    "utf-8": (b'{"text": "\xff\xfe"}', "invalid UTF-8"),
    "surrogate": (b'{"text": "\\ud800"}', "half a UTF-16 pair"),
    "depth": (b'{"text": ' + b"[" * 100_000, "nested too deeply"),
    "digits": (b'{"n": ' + b"9" * 5000 + b', "text": "a"}', "invalid JSON"),
    "long": (json.dumps({"text": "x" * 2000}).encode(), "more than data.max_document_mib"),
}


@pytest.mark.parametrize("name", BAD_ROWS)
def test_rows_57_and_59(tmp_path, name):
    """A bad row stops the run with its place, or is left out and counted."""
    bad, text = BAD_ROWS[name]
    rows = [*ROWS[:40], bad, *ROWS[40:]]
    file = write_rows(tmp_path / "a.jsonl", rows)
    byte = sum(len(row) + 1 for row in rows[:40])
    num_workers = 1 if name == "syntax" else 0
    with pytest.raises(DataError) as error:
        read_all(file, max_document_mib=1e-3, num_workers=num_workers)
    assert str(error.value).startswith(f"{file}:41 (byte {byte}): ") and text in str(error.value)
    targets, last = read_all(file, max_document_mib=1e-3, on_bad_row="skip")
    write_rows(file, ROWS)
    assert (targets, last.bad_rows) == (read_all(file, max_document_mib=1e-3)[0], 1)


def test_row_57_too_many_bad_rows(tmp_path):
    file = write_rows(tmp_path / "a.jsonl", [*ROWS, *["{"] * 12])
    assert read_all(file, on_bad_row="skip", max_bad_rows=12)[1].bad_rows == 12
    with pytest.raises(DataError, match="max_bad_rows = 2"):
        read_all(file, on_bad_row="skip", max_bad_rows=2)


def test_row_57_bad_rows_are_counted_in_the_first_epoch(tmp_path):
    """Else one bad row would end a long run on little data."""
    file = write_rows(tmp_path / "a.jsonl", [*ROWS, "{", "{"])
    targets, last = read_all(file, epochs=3, on_bad_row="skip", max_bad_rows=2)
    assert last.bad_rows == 2 and targets > 2 * read_all(write_rows(file, ROWS))[0]


def test_row_57_bad_rows_are_counted_once_over_a_resume(tmp_path):
    rows = [row for good in ROWS for row in (good, "{")]
    config = make_config(str(write_rows(tmp_path / "a.jsonl", rows)), epochs=1, on_bad_row="skip")
    states, run = None, None
    while run is None or not run.ended:
        run = Run(config, lane_states=states, num_lanes=2)
        run.step()
        states = run.lane_states
    assert sum(state["bad_rows"] for state in states.values()) == len(ROWS)


def test_row_57_array(tmp_path):
    file = tmp_path / "a.json"
    place = rf"a\.json:1 \(byte {len(', '.join(ROWS[:5]).encode()) + 3}\)"
    file.write_text("[" + ", ".join([*ROWS[:5], "7", *ROWS[5:]]) + "]")
    with pytest.raises(DataError, match=rf"{place}: expected a JSON object, found a number"):
        read_all(file)
    file.write_text("[" + ", ".join([*ROWS[:5], "{]", *ROWS[5:]]) + "]")
    with pytest.raises(DataError, match=rf"{place}: invalid JSON"):
        read_all(file)
    file.write_text("[" + ", ".join(ROWS))
    assert "an array is not closed" in only(look(facts_for(file, lanes=1))).problem


@pytest.mark.fault("F40")
@pytest.mark.parametrize("form", ["gz", "zst"])
@pytest.mark.parametrize("damage", ["half", "one byte less", "flipped"])
def test_row_58_truncated(tmp_path, form, damage):
    letters = random.Random(0)
    rows = [json.dumps({"text": f"{n} {letters.randbytes(400).hex()}"}) for n in range(1000)]
    content = "\n".join(rows).encode()
    if form == "gz":
        packed = gzip.compress(content)
    else:
        packed = zstandard.ZstdCompressor(write_checksum=True).compress(content)
    middle = len(packed) // 2
    broken = {
        "half": packed[:middle],
        "one byte less": packed[:-1],
        "flipped": packed[:middle] + bytes([packed[middle] ^ 64]) + packed[middle + 1 :],
    }[damage]
    file = tmp_path / f"a.jsonl.{form}"
    file.write_bytes(broken)
    problem = only(look(facts_for(file, lanes=2)))
    assert f"a.jsonl.{form}" in problem.problem and "fetch the file" in problem.fix
    # Before a checksum fails, damaged content may already fail to be JSON.
    with pytest.raises(DataError, match=rf"a\.jsonl\.{form}:.*(damaged|invalid)"):
        read_all(file)
    file.write_bytes(packed)
    assert look(facts_for(file, lanes=2)) == []
    whole, _ = read_all(file)
    file.write_bytes(broken)
    if damage == "half":
        targets, last = read_all(file, on_bad_row="skip")
        assert last.bad_rows == 1 and 0 < targets < whole


def test_row_59_huge_row_is_not_held_in_memory(tmp_path):
    """The rest of a row beyond the limit is passed over, however long it is."""
    huge = b'{"text": "' + b"x" * (30 * 2**20) + b'"}'
    file = write_rows(tmp_path / "a.jsonl", [*ROWS, huge])
    with pytest.raises(DataError, match=r"a\.jsonl:61 .*longer than"):
        read_all(file, max_document_mib=1e-2)
    assert read_all(file, on_bad_row="skip", max_document_mib=1e-2)[1].bad_rows == 1


def test_row_59_text_of_any_form(tmp_path):
    """A few zeros, no line ends at all."""
    (tmp_path / "a.txt").write_bytes(bytes(range(128)) * 128 + "数学".encode() * 20_000)
    targets, last = read_all(tmp_path / "a.txt")
    assert targets > 100_000 and last.bad_rows == 0


def test_row_59_nul_in_json(tmp_path):
    file = write_rows(tmp_path / "a.jsonl", [*ROWS, '{"text": "a\\u0000b"}'])
    tokenizer = build_tokenizer("bytes")
    run = Run(make_config(str(file), epochs=1, shuffle=False), num_lanes=1)
    text = tokenizer.decode([int(token) for step in run.steps() for token in step.flatten()])
    assert text.endswith("a\0b")


def test_files_that_change_during_a_run(tmp_path):
    file = write_rows(tmp_path / "a.jsonl", ROWS * 10)
    run = Run(make_config(str(file)))
    run.step()
    with file.open("a") as stream:
        stream.write(ROWS[0] + "\n")
    with pytest.raises(DataError, match=r"a\.jsonl: had \d+ bytes when the run started"):
        for _ in range(1000):
            run.step()
    file.unlink()
    with pytest.raises(DataError, match=r"a\.jsonl: cannot be read: No such file"):
        settings = run.loaders[0]._reader.mixture.sources[0]
        next(settings.source.rows(settings.shards[0]))


# Workers, lanes, fingerprints ------------------------------------------------------------------


def test_row_63_workers():
    workers = "training__dataloader"
    bad = facts_for(None, training__dataset="stdlib", **{f"{workers}__prefetch_factor": 2})
    assert "without worker processes" in only(check_static(bad)).problem
    odd = facts_for(None, training__dataset="stdlib", **{f"{workers}__num_workers": 3})
    problem = only(check_static(odd))
    assert problem.severity == "warning"
    assert "does not divide the 4 data lanes of a rank" in problem.problem
    with pytest.raises(ValueError, match="greater than or equal to 0"):
        facts_for(None, **{f"{workers}__num_workers": -1})


def test_lanes_that_do_not_fit():
    stdlib = {"training__dataset": "stdlib"}
    problem = only(check_static(facts_for(None, lanes=3, **stdlib)))
    assert "global batch of 4" in problem.problem and "a divisor of 4" in problem.fix
    stdlib["training__global_batch_size"] = 8
    problem = only(check_static(facts_for(None, dp=4, lanes=2, **stdlib)))
    assert "2 lanes cannot be shared by 4" in problem.problem and "a multiple of 4" in problem.fix
    stdlib["training__global_batch_size"] = 67  # prime: no lanes up to 64 but 1 divide it
    problem = only(check_static(facts_for(None, dp=4, **stdlib)))
    assert "chosen from" in problem.problem and "multiple of 4" in problem.fix


def test_row_64_fingerprint(tmp_path):
    """Names the data, not where they are: it follows content and cutting, and survives a move."""
    for folder in ("one", "two"):
        (tmp_path / folder).mkdir()
        write_rows(tmp_path / folder / "a.jsonl")
        write_rows(tmp_path / folder / "b.jsonl", ROWS[:50])

    def fingerprint(folder, **options):
        config = make_config(str(tmp_path / folder), **options)
        return Run(config, num_lanes=2).loaders[0].fingerprint

    first = fingerprint("one")
    assert fingerprint("two") == first and fingerprint("one", epochs=2) == first
    assert fingerprint("one", shuffle=False) != first
    write_rows(tmp_path / "two" / "b.jsonl", ROWS[:51])
    assert fingerprint("two") != first
    os.rename(tmp_path / "one" / "b.jsonl", tmp_path / "one" / "c.jsonl")
    assert fingerprint("one") != first


def test_a_state_of_something_else_is_refused(tmp_path):
    config = make_config(str(write_rows(tmp_path / "a.jsonl")))
    others = {1: {"0": {}, "2": {}}, 0: {str(n): {"offset": 1} for n in range(4)}}
    for lane, states in others.items():
        with pytest.raises(DataError, match=f"state of data lane {lane}"):
            Run(config, lane_states=states)
