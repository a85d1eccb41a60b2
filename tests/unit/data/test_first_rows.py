"""A look at the first rows only warns: what refuses a row is `data.on_bad_row`."""

import gzip
import json

import pyarrow
import pyarrow.parquet
import pytest
from data_runs import Run, make_config
from test_bad_data import ROWS, facts_for, only, read_all, write_rows

from torchtitan.config import DataError
from torchtitan.preflight.data import check_environment


def test_empty_first_rows(tmp_path):
    file = tmp_path / "a.jsonl.gz"
    file.write_bytes(gzip.compress("\n".join(['{"text": ""}'] * 200 + ROWS).encode()))
    problem = only(check_environment(facts_for(file, lanes=1)))
    assert problem.severity == "warning" and "the first rows hold no text" in problem.problem
    assert read_all(file)[0] > 1000


def test_no_row_at_all(tmp_path):
    for name, content in (("a.json", b" [[], []]"), ("a.jsonl.gz", gzip.compress(b"\n\n"))):
        (tmp_path / name).write_bytes(content)
        refusal = check_environment(facts_for(tmp_path / name, lanes=1))[-1]
        assert refusal.severity == "error" and refusal.problem == "holds no document"


@pytest.mark.parametrize("form", ["jsonl", "parquet"])
def test_a_null_in_the_first_rows(tmp_path, form):
    """Refused with both ways out where rows may not be left out, else a warning at most."""
    for num_nulls, key in ((1, "training.dataset_path"), (20, "data.text_column")):
        texts = [None] * num_nulls + [f"text {n}" for n in range(60)]
        file = tmp_path / f"a.{form}"
        if form == "jsonl":
            write_rows(file, [json.dumps({"text": text}) for text in texts])
        else:
            pyarrow.parquet.write_table(pyarrow.table({"text": texts}), file)
        problem = only(check_environment(facts_for(file, lanes=1)))
        assert problem.key == key and problem.severity == "error"
        assert "null" in problem.problem and 'data.on_bad_row = "skip"' in problem.fix
        problems = check_environment(facts_for(file, lanes=1, data__on_bad_row="skip"))
        assert [problem.severity for problem in problems] == ["warning"] * (num_nulls > 8)
        assert read_all(file, on_bad_row="skip")[1].bad_rows == num_nulls


@pytest.mark.parametrize(
    ("ids", "text"),
    [
        ([1, None, 3], "element 1 is null"),
        ([1, 2, -1], "element 2 is -1"),
        ([2**31, 2], f"element 0 is {2**31}"),
        ([1, 2**70], f"element 1 is {2**70}"),
        ([1, 2.5], "element 1 is 2.5"),
        ([1, True], "element 1 is True"),
        ([False, 2], "element 0 is False"),
        ([1, "a"], "element 1 is a"),
        ([1, 264], "element 1: token 264 is not one of the tokenizer's 264"),
        (["a", "b"], "an array where text is expected"),
    ],
)
def test_an_element_that_is_no_token_is_named(tmp_path, ids, text):
    rows = [json.dumps({"ids": row}) for row in ([7, 8], [], ids)]
    write_rows(tmp_path / "a.jsonl", rows * 4)
    config = make_config(str(tmp_path / "a.jsonl"), text_column="ids", shuffle=False)
    with pytest.raises(DataError, match=r"a\.jsonl:3 .*column 'ids'|token 264") as error:
        Run(config, num_lanes=1, global_batch=1).step()
    assert text in str(error.value)
