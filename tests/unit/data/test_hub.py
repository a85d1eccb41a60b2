"""Datasets of the hub, read by the real library from a hub on this machine."""

import gzip
import json
import os
import sys
from pathlib import Path
from typing import Any

import pytest

import torchtitan
from tests.forked import execute
from tests.unit.hub_server import COMMIT, Hub, Repository

CARD = b"""---
configs:
- config_name: en
  data_files:
  - split: train
    path: en/c4-train.*.json.gz
  - split: validation
    path: en/c4-validation.*.json.gz
- config_name: other
  data_files: other/*.json.gz
---
"""


def lines(name: str, count: int = 40) -> bytes:
    rows = [{"text": f"<{name} {n}> words", "url": "", "n": n} for n in range(count)]
    return gzip.compress("".join(json.dumps(row) + "\n" for row in rows).encode())


REPOSITORIES = {
    "allenai/c4": Repository(
        {
            "README.md": CARD,
            **{f"en/c4-train.{n:05}-of-00005.json.gz": lines(f"train {n}") for n in range(5)},
            "en/c4-validation.00000-of-00001.json.gz": lines("validation"),
            "other/a.json.gz": lines("other"),
        }
    ),
    "own/plain": Repository({"data/train.jsonl": gzip.decompress(lines("plain"))}),
    "own/large": Repository({"data/train.jsonl": gzip.decompress(lines("large"))}),
    "own/gated": Repository(refusal="GatedRepo"),
    "own/busy": Repository(refusal="TooManyRequests"),
    "own/card": Repository({"README.md": b"only words"}),
    "own/script": Repository({"script.py": b"raise SystemExit('ran')"}),
    "own/pickled": Repository({"train.pkl": b"cos\nsystem\n(S'touch ran'\ntR."}),
}

# What one process asks for, one after another: importing the libraries takes longer than all of it.
SCRIPT = """
import dataclasses, json, os, sys, time
from pathlib import Path
sys.path[:0] = {folders!r}
pauses = []
time.sleep = pauses.append  # the library's, between its tries
import numpy as np
from data_runs import Run, make_config
from test_bad_data import facts_for
from torchtitan.preflight.data import check_environment

def tell(dataset, **data):
    return told(facts_of(dataset, data))

def facts_of(dataset, data):
    options = {{"data__" + name: value for name, value in data.items()}}
    return facts_for(None, training__dataset=dataset, **options)

def told(context):
    return [str(p) for p in check_environment(context)]

def check(dataset, **data):
    '''What a check on a machine that does not train tells, and whether it prepared the data.'''
    tales = told(dataclasses.replace(facts_of(dataset, data), full=False))
    folders = [*Path(os.environ["HF_HOME"], "datasets").glob("*/**/*.arrow")]
    return tales, [f.name for f in folders if dataset.rpartition("/")[2] in str(f)]

def order(dataset, **data):
    '''The steps of one epoch, and whether two ranks, and a stop half way, give the same.'''
    config = make_config(None, dataset=dataset, epochs=1, **data)
    run, states, steps = Run(config), [], []
    for step in run.steps():
        steps.append(step)
        states.append(run.lane_states)
    half = len(steps) // 2
    two = list(Run(config, 2).steps())
    rest = list(Run(config, 4, lane_states=states[half]).steps())
    same = np.array_equal(steps, two) and np.array_equal(steps[half + 1 :], rest)
    text = bytes(t for t in np.stack(steps).transpose(2, 0, 1, 3).flatten().tolist() if t < 256)
    return [len(steps), same, sorted(set(text.decode().replace("words", "\\n").split("\\n")))]

print(json.dumps({{name: eval(name) for name in {cases!r}}}))
"""


def ask(home: Path, endpoint: str, cases: list[str], **environment: str) -> dict[str, Any]:
    """Evaluate the expressions in a process of their own, which reads the variables."""
    folders = [str(Path(__file__).parent), str(Path(torchtitan.__file__).parents[1])]
    known = {**os.environ, "HF_HOME": str(home), "HF_ENDPOINT": endpoint, **environment}
    known.pop("HF_TOKEN", None)
    script = SCRIPT.format(folders=folders, cases=cases)
    done = execute([sys.executable, "-c", script], known, home)
    assert done.returncode == 0, done.stderr
    assert not (home / "ran").exists()
    answers: dict[str, Any] = json.loads(done.stdout.splitlines()[-1])
    return answers


MESSAGES = {
    "tell('hf:own/gated')": ['training.dataset = "hf:own/gated"', "is gated", "HF_TOKEN"],
    "tell('hf:own/absent')": ["there is no dataset own/absent on the hub, or it is private"],
    "tell('hf:own/busy')": ["the hub refused own/busy"],
    "tell('hf:own/plain', revision='v9')": ['data.revision = "v9"', "no such revision"],
    "tell('hf:own/plain', split='trian')": ["data.split", 'did you mean "train"'],
    "tell('hf:own/plain', text_column='body')": ["data.text_column", "'text', 'url', 'n'"],
    "tell('hf:own/plain', text_column='n')": ["data.text_column", "holds int64", "text, url"],
    "tell('hf:allenai/c4')": ["data.subset", "has 2 subsets", "choose from en, other"],
    "tell('c4', subset='eng')": ["data.subset", "no such subset", 'did you mean "en"'],
    "tell('hf:own/card')": ["holds no files of a known format"],
    "tell('hf:own/script')": ["scripts are no longer supported"],
    "tell('hf:own/pickled')": ["format"],
}
PINNED = f"revision='{COMMIT}'"
READ = {
    "order('c4')": {f"<train {f} {n}> " for f in range(5) for n in range(40)},
    "order('c4_validation')": {f"<validation {n}> " for n in range(40)},
    "order('hf:allenai/c4', subset='other')": {f"<other {n}> " for n in range(40)},
    "order('hf:own/plain', streaming=False)": {f"<plain {n}> " for n in range(40)},
}
PROBED = ["tell('c4')", f"tell('c4', {PINNED})"]


LIGHT = [
    f"check('hf:own/large', streaming=False, split='train[:50%]', {PINNED})",
    f"check('hf:own/plain', {PINNED})",
]
"""The latter is there already, so that finding nothing of the former means something."""


@pytest.fixture(scope="module")
def answers(tmp_path_factory: pytest.TempPathFactory) -> dict[str, Any]:
    with Hub(REPOSITORIES) as hub:
        home = tmp_path_factory.mktemp("hub")
        return ask(home, hub.url, [*MESSAGES, *READ, *PROBED, *LIGHT])


@pytest.mark.parametrize("case", MESSAGES)
def test_row_62_each_obstacle_has_its_own_message(answers, case):
    (message,) = answers[case]
    assert "\n" not in message
    for part in MESSAGES[case]:
        assert part in message


@pytest.mark.parametrize("case", READ)
def test_rows_come_once_and_in_the_same_order_on_every_mesh(answers, case):
    num_steps, same, documents = answers[case]
    assert num_steps > 1 and same
    assert set(documents) - {""} == READ[case]


def test_a_moving_revision_is_warned_of(answers):
    (message,) = answers[PROBED[0]]
    assert "data.revision" in message and COMMIT in message
    assert answers[PROBED[1]] == []


def test_a_check_downloads_no_dataset(answers):
    light, prepared = (answers[case] for case in LIGHT)
    assert light == [[], []]
    assert prepared[0] == [] and prepared[1]


def test_row_62_offline(tmp_path):
    case = "tell('hf:own/plain')"
    closed = "http://127.0.0.1:9"
    answers = ask(tmp_path, closed, [case, "tell('c4')", "sum(pauses)"])
    for (message,) in (answers[case], answers["tell('c4')"]):
        assert "the hub cannot be reached" in message and '"hf"' in message
    # Of ours, of each; the library alone would pause for 23 seconds.
    assert 0 < answers["sum(pauses)"] <= 4
    (message,) = ask(tmp_path, closed, [case], HF_HUB_OFFLINE="1")[case]
    assert "HF_HUB_OFFLINE forbids" in message
