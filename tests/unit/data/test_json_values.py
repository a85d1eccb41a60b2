"""JSON is read whole: arrays after arrays, values on several lines, arrays in arrays."""

import gzip
import json
from collections import Counter

import numpy as np
import pytest
from data_runs import NUM_LANES, Run, make_config, make_documents
from test_bad_data import facts_for, only, read_all
from test_data_order import all_steps, lane_documents

from torchtitan.preflight.data import check_environment

DOCUMENTS = make_documents(120)
ROWS = [json.dumps({"text": text}, ensure_ascii=False) for text in DOCUMENTS]
ARRAY, LINES = f"[{', '.join(ROWS[:60])}]", "\n".join(ROWS[60:])
PRETTY = [json.dumps({"text": text, "tags": [[1], {}]}, indent=2) for text in DOCUMENTS]
FORMS = {
    "array after array": f"{ARRAY}\n[{','.join(ROWS[60:])}]",
    "arrays on one line": f"{ARRAY}[{','.join(ROWS[60:])}]",
    "lines after an array": f"{ARRAY}\n{LINES}\n",
    "an array after lines": f"{LINES}\n{ARRAY}",
    "objects over several lines": "\n".join(PRETTY),
    "objects on one line": "".join(ROWS),
    "lines with commas": ",\n".join(ROWS),
    "arrays in an array": "[" + ",\n".join(f"[{row}]" for row in ROWS) + "]",
    "an array a line": "\n".join(f"[{a}, {b}]" for a, b in zip(ROWS[::2], ROWS[1::2])),
    "files with marks put together": f"\ufeff{ARRAY}\n\ufeff{LINES}",
    "lines with marks put together": "\n".join("\ufeff" + row for row in ROWS),
}


@pytest.mark.parametrize("name", FORMS)
@pytest.mark.parametrize("suffix", ["json", "jsonl.gz"])
def test_every_document_is_read(tmp_path, name, suffix):
    content = FORMS[name].encode()
    file = tmp_path / f"a.{suffix}"
    file.write_bytes(gzip.compress(content) if suffix.endswith("gz") else content)
    assert check_environment(facts_for(file, lanes=4)) == []
    config = make_config(str(file), epochs=1)
    steps = all_steps(config)
    seen = [text for lane in range(NUM_LANES) for text in lane_documents(steps, lane)]
    assert Counter(seen) == Counter(DOCUMENTS)
    run = Run(config)
    run.step()
    resumed = Run(config, dp=2, lane_states=run.lane_states)
    assert np.array_equal(np.stack(list(resumed.steps())), steps[1:])


def test_one_object_over_several_lines(tmp_path):
    (tmp_path / "a.json").write_text(json.dumps({"text": "one"}, indent=4))
    assert lane_documents(
        all_steps(make_config(str(tmp_path / "a.json"), epochs=1), num_lanes=1, global_batch=1), 0
    ) == ["one"]


@pytest.mark.parametrize(
    ("content", "line", "byte", "reason"),
    [
        (f"{ARRAY}\ngarbage", 2, len(ARRAY.encode()) + 1, "Expecting value"),
        (f"{ARRAY}]", 1, len(ARRAY.encode()) + 1, "`]` where no array is open"),
        (ARRAY[:-1], 1, len(ARRAY.encode()) - 1, "not closed, as if the file were cut short"),
        (ARRAY + '{"text": "cut', 1, len(ARRAY.encode()), "as if the file were cut short"),
        (ARRAY + '{"text": tru}', 1, len(ARRAY.encode()), f"byte {len(ARRAY.encode()) + 9}"),
        (ARRAY + "[" * 10**5, 1, len(ARRAY.encode()) + 10**5, "an array is not closed"),
        (ARRAY + '{"a":' + "[" * 10**5, 1, len(ARRAY.encode()), "nested too deeply"),
        (ARRAY.encode() + b'{"text": "\xe9t\xe9"}', 1, len(ARRAY.encode()), 'encoding = "latin-1"'),
    ],
)
def test_the_rest_is_refused_with_its_place(tmp_path, content, line, byte, reason):
    """And left out as one row."""
    file = tmp_path / "a.json"
    file.write_bytes(content if isinstance(content, bytes) else content.encode())
    problem = only(check_environment(facts_for(file, lanes=1))).problem
    assert problem.startswith(f"{file}:{line} (byte {byte}): ") and reason in problem
    targets, last = read_all(file, on_bad_row="skip")
    file.write_text(ARRAY)
    assert (targets, last.bad_rows) == (read_all(file)[0], 1)


def test_a_first_line_that_is_no_json_is_a_bad_row(tmp_path):
    """And not the beginning of an object over several lines, of which nothing could be read."""
    for first in ('{"text": "cut', '{"text": "a"', '{"text": "a"} garbage'):
        (tmp_path / "a.jsonl").write_text("\n".join([first, *ROWS]))
        targets, last = read_all(tmp_path / "a.jsonl", on_bad_row="skip")
        assert last.bad_rows == 1 and targets > sum(len(text) for text in DOCUMENTS)
