"""A resume with other data than the checkpoint's: its meaning in numbers, and beginning anew."""

import json
import re
from collections import Counter

import numpy as np
import pytest
from data_runs import Run, make_config

from torchtitan.config import ConfigError
from torchtitan.data.identity import differences

NUM = 8000
"""Documents of the first run."""
NEW = range(NUM, NUM + 400)


def write(folder, name, numbers, bad=0):
    rows = [json.dumps({"text": f"<{number}> and more"}) for number in numbers]
    (folder / name).write_text("\n".join([*rows, *["{"] * bad]) + "\n")


@pytest.fixture
def folder(tmp_path):
    for part in range(4):
        write(tmp_path, f"{part}.jsonl", range(part * NUM // 4, (part + 1) * NUM // 4))
    return tmp_path


def resumed(run, folder, dp=1, **data):
    fingerprint = run.loaders[0].fingerprint
    config = make_config(str(folder), **data)
    return Run(config, dp, lane_states=run.lane_states, fingerprint=fingerprint)


def documents_in(steps):
    """Each document by number: how often it begins."""
    lanes = np.stack(steps).transpose(2, 0, 1, 3).reshape(4, -1)
    texts = (bytes(token for token in lane.tolist() if token < 256).decode() for lane in lanes)
    return Counter(int(number) for text in texts for number in re.findall(r"<(\d+)>", text))


def rest_of_epoch(run, epoch):
    """Steps until all lanes are in a later epoch."""
    steps = []
    while not steps or min(state["epoch"] for state in run.lane_states.values()) <= epoch:
        steps.append(run.step())
    return steps


def numbers_of(change):
    found = re.search(r"(\d+)% through epoch (\d+): up to (\d+)% of the data", change)
    assert found, change
    return [float(text) for text in found.groups()]


def test_a_change_is_told_in_numbers_that_hold(folder):
    run = Run(make_config(str(folder)))
    before = documents_in([run.step() for _ in range(130)])
    write(folder, "new.jsonl", NEW)
    again = resumed(run, folder)
    done, epoch, share = numbers_of(again.loaders[0].change)
    assert epoch == 0 and abs(done / 100 - len(before) / NUM) < 0.06
    after = documents_in(rest_of_epoch(again, 0))
    both, old = before + after, range(NUM)
    twice = sum(both[number] > 1 for number in old) / NUM
    never = sum(both[number] == 0 for number in old) / NUM
    assert 0 < twice <= share / 100 + 0.02 and 0 < never <= share / 100 + 0.02
    assert "data.restart = true" in again.loaders[0].change


def test_a_restart_reads_all_of_the_new_data_in_the_next_epoch(folder):
    run = Run(make_config(str(folder)))
    for _ in range(20):
        run.step()
    write(folder, "new.jsonl", NEW)
    anew = resumed(run, folder, restart=True, dp=2)
    assert "epoch 1 starts over with them" in anew.loaders[0].change
    steps = [anew.step()]
    state = json.loads(json.dumps(anew.lane_states))
    assert {place["epoch"] for place in state.values()} == {1}
    # A resume with the same data goes on, with the setting still there.
    print_of = anew.loaders[0].fingerprint
    config = make_config(str(folder), restart=True)
    third = Run(config, lane_states=state, fingerprint=print_of)
    assert third.loaders[0].change == ""
    steps += rest_of_epoch(anew, 1)
    assert all(np.array_equal(third.step(), step) for step in steps[1:])
    counted = documents_in(steps)
    assert all(counted[number] >= 1 for number in range(NUM + 400))
    assert sum(counted.values()) < 1.1 * (NUM + 400)  # lanes that are through go on


def test_rows_that_cannot_be_read_are_counted_in_new_data(folder):
    run = Run(make_config(str(folder), on_bad_row="skip"))
    run.step()
    write(folder, "new.jsonl", NEW, bad=7)
    anew = resumed(run, folder, restart=True, on_bad_row="skip")
    rest_of_epoch(anew, 2)
    assert sum(place["bad_rows"] for place in anew.lane_states.values()) == 7


def test_a_restart_of_a_mixture(folder, tmp_path):
    (folder / "more").mkdir()
    write(folder / "more", "a.jsonl", range(9000, 9500))

    def tables(*names):
        return [{"path": str(folder / name), "weight": 1} for name in names]

    run = Run(make_config(None, dataset="auto", sources=tables("0.jsonl", "more/a.jsonl")))
    for _ in range(5):
        run.step()
    names = ("0.jsonl", "1.jsonl", "more/a.jsonl")
    print_of = run.loaders[0].fingerprint
    config = make_config(None, dataset="auto", sources=tables(*names), restart=True)
    anew = Run(config, lane_states=run.lane_states, fingerprint=print_of)
    anew.step()
    places = [place for state in anew.lane_states.values() for place in state["sources"]]
    assert len(places) == 12 and {place["epoch"] for place in places} == {1}


def test_epochs_must_be_left(folder):
    run = Run(make_config(str(folder), epochs=1))
    run.step()
    write(folder, "new.jsonl", NEW)
    with pytest.raises(ConfigError, match=r"data.epochs = 1: data.restart would begin epoch 1"):
        resumed(run, folder, restart=True, epochs=1)


def test_another_tokenizer_is_refused_with_a_restart_too():
    stored = {"data": [{"data": {"files": [["a", 1]]}}], "tokenizer": "one", "num_lanes": 4}
    now = {"data": [{"data": {"files": [["b", 1]]}}], "tokenizer": "two", "num_lanes": 8}
    assert set(differences(stored, now, anew=True)) == {"model.tokenizer_path"}
    assert differences(None, now, anew=True) == {}
    assert differences(stored, {**now, "tokenizer": "one"}, anew=True) == {}
