"""Several sources by token share: exact shares, whole streams, resumes, bad inputs."""

import json
import random
from fractions import Fraction
from pathlib import Path

import numpy as np
import pytest
from data_runs import GLOBAL_BATCH, NUM_LANES, SEQ_LEN, Run
from test_bad_data import facts_for, only

from torchtitan.config import ConfigError, DataError, JobConfig
from torchtitan.data.document_ends import document_tokenizer
from torchtitan.data.loader import _settings
from torchtitan.data.mixture import Mixture, Shares
from torchtitan.data.named_sources import named_sources
from torchtitan.data.packing import Sample, make_batch
from torchtitan.data.tokenizers import build_tokenizer
from torchtitan.models.batch import IGNORE_INDEX
from torchtitan.preflight.data import check_environment, check_static

BOS, EOS = 256, 257
WEIGHTS = {"a": 5, "b": 3, "c": 2}
LENGTHS = {"a": 12, "b": 120, "c": 600}
"""Letters a document, more or less; the last ones are longer than what a share may be off by."""
COUNTS = {"a": 900, "b": 90, "c": 4}
"""Documents; those of c are over soon."""


def write_sources(folder: Path) -> list[dict]:
    """Three files, each of documents of one letter."""
    generator = random.Random(1)
    tables = []
    for letter, weight in WEIGHTS.items():
        rows = []
        for _ in range(COUNTS[letter]):
            length = generator.randint(LENGTHS[letter] // 2, LENGTHS[letter] * 3 // 2)
            rows.append(json.dumps({"text": letter * length}))
        (folder / f"{letter}.jsonl").write_text("\n".join(rows))
        tables.append({"path": str(folder / f"{letter}.jsonl"), "weight": weight})
    return tables


def make_config(tables: list[dict], num_workers: int = 0, **data) -> JobConfig:
    training = {"seq_len": SEQ_LEN, "dataloader": {"num_workers": num_workers}}
    return JobConfig.model_validate({"training": training, "data": {"sources": tables, **data}})


@pytest.fixture(scope="module")
def config(tmp_path_factory: pytest.TempPathFactory) -> JobConfig:
    return make_config(write_sources(tmp_path_factory.mktemp("sources")))


def with_workers(config: JobConfig, num_workers: int) -> JobConfig:
    return make_config([t.model_dump() for t in config.data.sources], num_workers)


def count_letters(steps: np.ndarray) -> tuple[dict[str, int], int]:
    """Tokens by source, `steps` being `[..., seq_len]`: start tokens belong to what follows, end
    tokens to what is before; and how many have no such neighbour in their sequence."""
    counts, unclear = dict.fromkeys(WEIGHTS, 0), 0
    for row in steps.reshape(-1, steps.shape[-1]).tolist():
        for t, token in enumerate(row):
            near = t + 1 if token == BOS else t - 1 if token == EOS else t
            letter = chr(row[near]) if 0 <= near < len(row) and row[near] < 256 else ""
            if letter:
                counts[letter] += 1
            else:
                unclear += 1
    return counts, unclear


# Shares ----------------------------------------------------------------------------------------


@pytest.mark.parametrize("weights", [(1, 1), (0.7, 0.2, 0.1), (0.97, 0.02, 0.01), (3, 0, 1)])
@pytest.mark.parametrize(("num_lanes", "seq_len"), [(1, 48), (4, 256), (16, 4096)])
def test_shares_are_exact_at_every_round(weights, num_lanes, seq_len):
    shares = Shares(weights, num_lanes, seq_len)
    wanted = [Fraction(str(w)) / sum(Fraction(str(w)) for w in weights) for w in weights]
    taken = [0] * len(weights)
    by_lane = np.zeros((num_lanes, len(weights)))
    while sum(taken) < 1500 * len(weights) * seq_len:
        dealt = shares.deal(taken)
        assert sum(dealt) == num_lanes * seq_len and min(dealt) >= 0
        by_source = [0] * len(weights)
        for lane in range(num_lanes):
            parts = shares.parts(dealt, sum(taken) // (num_lanes * seq_len), lane)
            assert sum(count for _, count in parts) == seq_len
            for source, count in parts:
                by_source[source] += count
                by_lane[lane, source] += count
        assert by_source == dealt
        taken = [before + now for before, now in zip(taken, dealt)]
        for share, count in zip(wanted, taken):
            assert abs(count - share * sum(taken)) <= max(len(weights), Fraction(sum(taken), 1000))
    # From some thousand sequences on, sequences are whole.
    assert {count % seq_len for count in shares.deal(taken)} == {0}
    assert [share == 0 for share in wanted] == [count == 0 for count in taken]
    # And every lane has its part of every source, give or take a few sequences of thousands.
    fair = np.array([float(share) for share in wanted]) * sum(taken) / num_lanes
    assert np.all(abs(by_lane - fair) <= 4 * seq_len)


def test_what_is_dealt_is_pinned():
    """Checkpoints rely on it."""
    shares = Shares([0.5, 0.3, 0.2], 4, 10)
    assert shares.deal([0, 0, 0]) == [20, 12, 8]
    assert shares.deal([19001, 11400, 7599]) == [20, 10, 10]
    assert shares.parts([20, 12, 8], 3, 0) == [(2, 8), (1, 2)][::-1]
    assert [shares.parts([20, 12, 8], r, 1) for r in range(3)] == [
        [(0, 10)],
        [(1, 2), (2, 8)],
        [(0, 10)],
    ]


def test_realised_share_of_what_is_trained_on(config):
    """Within 0.1% of all tokens after 1e5, on several lanes, though documents differ tenfold and
    more in length, and the longest are longer than the tolerance. What is told is compared with the
    letters themselves, up to the few tokens at cuts that have none beside them."""
    run = Run(config, dp=2)
    num_steps = -(-100_000 // (GLOBAL_BATCH * SEQ_LEN))
    counts, unclear = count_letters(np.stack([run.step() for _ in range(num_steps)]))
    total = num_steps * GLOBAL_BATCH * SEQ_LEN
    assert sum(run.source_tokens.values()) == sum(counts.values()) + unclear == total
    for letter, weight in WEIGHTS.items():
        told = run.source_tokens[letter]
        assert abs(counts[letter] - told) <= unclear
        assert abs(told / total - weight / 10) <= 1e-3
    assert unclear / total < 0.002
    # One source is through several times by now, and another is not.
    epochs = [[s["epoch"] for s in state["sources"]] for state in run.lane_states.values()]
    assert all(lane[2] > lane[0] for lane in epochs)


def test_each_source_is_read_as_if_alone(config):
    """Put together again, the parts of a source are its own stream: in order, complete, with every
    token a target once, over its epochs."""
    tokenizer = document_tokenizer(build_tokenizer("bytes"), config.data)
    named = named_sources(config.training, config.data)
    settings = [_settings(source, 7, tokenizer, NUM_LANES) for source in named]
    mixture = Mixture(tuple(settings), ("a", "b", "c"), (5, 3, 2))
    taken = dict.fromkeys(WEIGHTS, 0)
    for index in range(NUM_LANES):
        lane = mixture.lane(index, mixture.start())
        inputs: dict[str, list] = {letter: [] for letter in WEIGHTS}
        targets: dict[str, list] = {letter: [] for letter in WEIGHTS}
        for _ in range(300):
            sample = lane.next_sample()
            assert sum(sample.lengths) == len(sample.tokens)
            for part in sample.split():
                letters = {chr(token) for token in part.tokens.tolist() if token < 256}
                assert len(letters) == 1
                inputs[min(letters)] += part.tokens[:-1].tolist()
                targets[min(letters)] += part.tokens[1:].tolist()
        for source, letter in enumerate(WEIGHTS):
            alone = Mixture((settings[source],), (letter,), (1,))
            stream = alone.lane(index, alone.start())
            expected: list[int] = []
            while len(expected) <= len(inputs[letter]):
                expected += stream.next_sample().tokens[:-1].tolist()
            count = len(inputs[letter])
            taken[letter] += count
            assert count > 500 and inputs[letter] == expected[:count]
            assert targets[letter] == expected[1 : count + 1]
    assert tuple(taken.values()) == lane.position.taken


def test_batch_of_a_sequence_of_parts():
    """Two streams side by side: each predicts its own next token; no document spans both."""
    tokens = np.array([10, 11, 12, 13, 20, 21, 22, 23, 24], dtype=np.int32)
    sample = Sample(tokens, lengths=(2, 2, 4, 1), parts=(4, 5))
    plain = make_batch([sample], 7, document_mask=False, pad_id=0)
    assert plain["tokens"].tolist() == [[10, 11, 12, 20, 21, 22, 23]]
    assert plain["labels"].tolist() == [[11, 12, 13, 21, 22, 23, 24]]
    assert plain["document_ids"].tolist() == [[0, 0, 1, 2, 2, 2, 2]]
    assert plain["positions"].tolist() == [[0, 1, 2, 3, 4, 5, 6]]
    masked = make_batch([sample], 7, document_mask=True, pad_id=0)
    no = IGNORE_INDEX
    assert masked["labels"].tolist() == [[11, no, 13, 21, 22, 23, no]]
    assert masked["positions"].tolist() == [[0, 1, 0, 0, 1, 2, 3]]
    # A document that ends exactly where its part does.
    sample = Sample(tokens, lengths=(3, 1, 5), parts=(4, 5))
    masked = make_batch([sample], 7, document_mask=True, pad_id=0)
    assert masked["labels"].tolist() == [[11, 12, no, 21, 22, 23, 24]]
    assert masked["document_ids"].tolist() == [[0, 0, 0, 1, 1, 1, 1]]


# The same everywhere ---------------------------------------------------------------------------

NUM_STEPS = 80


@pytest.fixture(scope="module")
def expected(config) -> tuple[np.ndarray, list[dict]]:
    run = Run(config)
    steps, states = [], []
    for _ in range(NUM_STEPS):
        steps.append(run.step())
        states.append(run.lane_states)
    return np.stack(steps), states


@pytest.mark.parametrize(("dp", "num_workers"), [(2, 0), (4, 0), (1, 2), (2, 2)])
def test_mesh_and_workers_do_not_matter(config, expected, dp, num_workers):
    run = Run(with_workers(config, num_workers), dp)
    steps = [run.step() for _ in range(NUM_STEPS if num_workers == 0 else 12)]
    run.close()
    assert np.array_equal(np.stack(steps), expected[0][: len(steps)])


def test_resume_at_every_step(config, expected):
    """In the middle of documents, and on both sides of the epochs of each source."""
    steps, states = expected
    middle = [state["sources"][2]["token"] for step in states for state in step.values()]
    assert sum(token > 0 for token in middle) > len(middle) / 2
    ends = {state["sources"][2]["epoch"] for step in states for state in step.values()}
    assert len(ends) > 2
    for k in range(NUM_STEPS - 1):
        resumed = Run(config, (1, 2, 4)[k % 3], lane_states=states[k])
        assert np.array_equal(resumed.step(), steps[k + 1]), k
        assert resumed.lane_states == states[k + 1], k


def test_chain_of_resumes_with_workers(config, expected):
    steps, states = [], None
    for dp, num_workers in ((2, 2), (1, 0), (4, 1), (2, 0)):
        run = Run(with_workers(config, num_workers), dp, lane_states=states)
        steps += [run.step() for _ in range(7)]
        states = run.lane_states
        run.close()
    assert np.array_equal(np.stack(steps), expected[0][: len(steps)])
    assert states == expected[1][len(steps) - 1]


def test_state_is_small(expected):
    assert all(len(json.dumps(state)) < 600 for state in expected[1][-1].values())


def test_a_state_of_other_sources_is_refused(config, expected):
    two = make_config([t.model_dump() for t in config.data.sources[:2]])
    with pytest.raises(DataError, match="it is of 3 sources, and there are 2"):
        Run(two, lane_states=expected[1][0])
    one = make_config([config.data.sources[0].model_dump()])
    with pytest.raises(DataError, match="state of data lane 0"):
        Run(one, lane_states=expected[1][0])
    state = Run(one)
    state.step()
    with pytest.raises(DataError, match="state of data lane 0"):
        Run(config, lane_states=state.lane_states)


def test_one_source_is_read_as_without_a_table(tmp_path):
    table, *_ = write_sources(tmp_path)
    plain = JobConfig.model_validate(
        {
            "training": {"seq_len": SEQ_LEN, "dataset_path": table["path"]},
            "data": {"epochs": 2},
        }
    )
    runs = Run(make_config([table], epochs=2)), Run(plain)
    assert runs[0].loaders[0].fingerprint == runs[1].loaders[0].fingerprint
    first, second = (np.stack(list(run.steps())) for run in runs)
    assert np.array_equal(first, second)


def test_row_64_fingerprint_covers_all_sources(tmp_path):
    tables = write_sources(tmp_path)

    def fingerprint(*tables):
        return Run(make_config(list(tables))).loaders[0].fingerprint

    first = fingerprint(*tables)
    assert fingerprint(*tables) == first
    assert fingerprint(*tables[:2], {**tables[2], "weight": 2.5}) != first
    assert fingerprint(*tables[::-1]) != first
    (tmp_path / "c.jsonl").write_text((tmp_path / "c.jsonl").read_text() + '\n{"text": "cc"}')
    assert fingerprint(*tables) != first


# Bad inputs ------------------------------------------------------------------------------------


def mixed_facts(*tables: dict, **options):
    return facts_for(None, data__sources=list(tables), **options)


@pytest.mark.parametrize("weight", [-1.0, float("nan"), float("inf"), "1"])
def test_row_60_weights_that_are_none(weight):
    with pytest.raises(ValueError, match="weight"):
        mixed_facts({"dataset": "stdlib", "weight": weight})


def test_row_60_weights_and_doubles(tmp_path):
    a, b, c = write_sources(tmp_path)
    zeros = [{**table, "weight": 0} for table in (a, b)]
    assert "all weights are 0" in only(check_static(mixed_facts(*zeros))).problem
    huge = [{**table, "weight": 1e308} for table in (a, b)]
    assert "no finite sum" in only(check_static(mixed_facts(*huge))).problem
    problem = only(check_static(mixed_facts(a, b, {**a, "weight": 1})))
    assert problem.key == "data.sources[2]" and "same as data.sources[0]" in problem.problem
    hub = [{"dataset": "hf:own/data", "weight": 1, "revision": name} for name in ("v1", "v2")]
    assert [
        problem for problem in check_static(mixed_facts(*hub)) if "same as" in problem.problem
    ] == []
    named = [{**table, "name": "web"} for table in (a, b)]
    problem = only(check_static(mixed_facts(*named, c)))
    assert problem.key == "data.sources[0].name" and problem.value == "web"
    assert (
        check_static(mixed_facts(a, b, c)) == []
        and check_static(mixed_facts({**a, "weight": 0}, b)) == []
    )


def test_sources_stand_alone(tmp_path):
    a, b, _ = write_sources(tmp_path)
    problem = only(check_static(mixed_facts(a, b, training__dataset_path="x.jsonl")))
    assert problem.key == "training.dataset_path" and "both say what to read" in problem.problem
    problem = only(check_static(mixed_facts(a, b, training__dataset="text")))
    assert problem.key == "training.dataset"
    problem = only(check_static(mixed_facts(a, b, data__epochs=2)))
    assert problem.key == "data.epochs" and "training.steps" in problem.fix


def test_problems_name_the_table(tmp_path):
    a, b, c = write_sources(tmp_path)
    problem = only(check_static(mixed_facts(a, {**b, "dataset": "jsn"})))
    assert problem.key == "data.sources[1].dataset" and '"json"' in problem.fix
    problem = only(check_static(mixed_facts(a, {"weight": 1})))
    assert problem.key == "data.sources[1].path" and "set dataset = " in problem.fix
    gone = {**b, "path": str(tmp_path / "gone.jsonl")}
    problem = only(check_environment(mixed_facts(a, gone, c)))
    assert problem.key == "data.sources[1].path" and problem.missing_asset
    problem = only(check_environment(mixed_facts(a, {**b, "column": "body"})))
    assert problem.key == "data.sources[1].column" and "no column 'body'" in problem.problem
    (tmp_path / "few.jsonl").write_text('{"text": "one"}')
    few = {"path": str(tmp_path / "few.jsonl"), "weight": 1}
    problem = only(check_environment(mixed_facts(a, few, lanes=4)))
    assert problem.key == "data.lanes" and "data.sources[1] (few): " in problem.problem
    with pytest.raises(ConfigError, match=r"data\.sources\[1\]\.path.*does not exist"):
        Run(make_config([a, gone]))


def test_row_60_the_same_file_in_two_sources(tmp_path):
    a, b, _ = write_sources(tmp_path)
    both = {"path": str(tmp_path / "[ab].jsonl"), "weight": 1}
    problem = only(check_environment(mixed_facts(b, both)))
    assert problem.severity == "warning" and problem.key == "data.sources[1].path"
    assert "data.sources[0] (b)" in problem.problem and "b.jsonl" in problem.problem
    assert check_environment(mixed_facts(a, b)) == []


def test_names(tmp_path):
    tables = [
        {"path": "web/part-*.jsonl.gz", "weight": 1},
        {"path": "web", "weight": 1},
        {"dataset": "stdlib", "weight": 1},
        {"path": "books/a.txt", "weight": 1, "name": "web_2"},
        {"path": "*.jsonl", "weight": 1},
    ]
    config = make_config(tables)
    names = [source.name for source in named_sources(config.training, config.data)]
    assert names == ["web", "web_3", "stdlib", "web_2", "auto"]


def test_columns_differ(tmp_path):
    (tmp_path / "a.jsonl").write_text("\n".join(json.dumps({"text": "a" * 50}) for _ in range(50)))
    (tmp_path / "b.jsonl").write_text("\n".join(json.dumps({"body": "b" * 50}) for _ in range(50)))
    tables = [
        {"path": str(tmp_path / "a.jsonl"), "weight": 1},
        {"path": str(tmp_path / "b.jsonl"), "weight": 1, "column": "body"},
    ]
    assert check_environment(mixed_facts(*tables, lanes=2)) == []
    steps = np.stack([Run(make_config(tables)).step() for _ in range(2)])
    assert {ord("a"), ord("b")} < set(steps.flatten().tolist())
