"""The sequence of samples is a function of config, seed and step: of no mesh, worker or stop."""

import itertools
import random
from collections import Counter
from pathlib import Path

import numpy as np
import pytest
from data_runs import GLOBAL_BATCH, NUM_LANES, Run, make_config, make_documents, write_jsonl

from torchtitan.data import pieces
from torchtitan.data.shuffle import combine, permutation
from torchtitan.data.tokenizers import build_tokenizer
from torchtitan.data.workers import workers_for

BOS, EOS, PAD = 256, 257, 258


def all_steps(config, dp=1, name="tokens", **options):
    run = Run(config, dp, **options)
    steps = np.stack(list(run.steps(name)))
    run.close()
    return steps


def lane_documents(steps: np.ndarray, lane: int) -> list[str]:
    """The documents of a lane, told apart by their start and end tokens."""
    tokenizer = build_tokenizer("bytes")
    tokens = steps[:, :, lane].reshape(-1)
    tokens = tokens[tokens != PAD]
    starts, ends = np.flatnonzero(tokens == BOS), np.flatnonzero(tokens == EOS)
    assert len(starts) == len(ends) and np.all(starts[1:] == ends[:-1] + 1)
    return [tokenizer.decode(tokens[a:b].tolist()) for a, b in zip(starts, ends)]


def test_every_document_comes_once_an_epoch(dataset):
    path, documents = dataset
    steps = all_steps(make_config(path, epochs=3))
    seen = [text for lane in range(NUM_LANES) for text in lane_documents(steps, lane)]
    assert Counter(seen) == Counter(documents * 3)


def test_mesh_and_workers_do_not_matter(dataset):
    path, _ = dataset
    expected = all_steps(make_config(path, epochs=3))
    assert len(expected) > 20
    # Workers share lanes whatever the format is.
    several = [(2, 1), (2, 2), (4, 1)] if path.endswith(".jsonl") else []
    for dp, num_workers in [(2, 0), (4, 0), (1, 2), *several]:
        steps = all_steps(make_config(path, num_workers, epochs=3), dp)
        assert np.array_equal(steps, expected), (dp, num_workers)


@pytest.mark.fault("F32")
def test_resume_at_every_step(dataset):
    """With another degree each time; the state is exact, so the next step and the end suffice."""
    path, _ = dataset
    config = make_config(path, epochs=3)
    run = Run(config)
    steps, states = [], []
    for step in run.steps():
        steps.append(step)
        states.append(run.lane_states)
    one_file_each = Path(path, "0000.txt").exists()  # and a run takes long to list them
    for k in range(0, len(steps) - 1, 4 if one_file_each else 1):
        resumed = Run(config, (1, 2, 4)[k % 3], lane_states=states[k])
        assert np.array_equal(resumed.step(), steps[k + 1]), k
        assert resumed.lane_states == states[k + 1], k
    resumed = Run(config, 2, lane_states=states[-1])
    resumed.step()
    assert resumed.ended


@pytest.mark.fault("F32")
def test_chain_of_resumes(dataset):
    """Stop and resume again and again, with other degrees and workers, across epochs."""
    path, _ = dataset
    expected = all_steps(make_config(path, epochs=3))
    generator = random.Random(path[-5:])
    meshes = itertools.cycle([(4, 0), (1, 2), (2, 0), (1, 0), (2, 1), (4, 0)])
    states, steps = None, []
    while len(steps) < len(expected):
        dp, num_workers = next(meshes)
        run = Run(make_config(path, num_workers, epochs=3), dp, lane_states=states)
        for _ in range(min(generator.randint(1, 9), len(expected) - len(steps))):
            steps.append(run.step())
        states = run.lane_states
        run.close()
    assert np.array_equal(np.stack(steps), expected)


def test_endless_data_repeat_without_end(tmp_path):
    path = write_jsonl(tmp_path, make_documents(60))
    finite = all_steps(make_config(path, epochs=2))
    run = Run(make_config(path))
    endless = np.stack([run.step() for _ in range(3 * len(finite))])
    assert not run.ended
    whole = len(finite) - 2  # before any lane pads
    while np.any(finite[:whole] == PAD):
        whole -= 1
    assert whole > 5 and np.array_equal(endless[:whole], finite[:whole])
    assert all(state["epoch"] >= 5 for state in run.lane_states.values())


def test_targets_cover_the_stream_once(tmp_path):
    """Inputs and targets of a lane are its stream, shifted by one; nothing is lost at the seams."""
    path = write_jsonl(tmp_path, make_documents(80))
    config = make_config(path, epochs=1)
    tokens, labels = all_steps(config), np.stack(list(Run(config).steps("labels")))
    for lane in range(NUM_LANES):
        inputs = tokens[:, :, lane].reshape(-1)
        targets = labels[:, :, lane].reshape(-1)
        stream = inputs[inputs != PAD]
        assert np.array_equal(targets[targets >= 0], stream[1:])
        assert np.array_equal(targets[: len(stream) - 1], stream[1:])


def test_shuffling_follows_seed_and_epoch(tmp_path):
    path = write_jsonl(tmp_path, make_documents(100))
    one_lane = {"num_lanes": 1, "global_batch": 2}
    config = make_config(path, epochs=2)
    steps = all_steps(config, **one_lane)
    order = lane_documents(steps, 0)
    assert order[:100] != order[100:] and set(order[:100]) == set(order[100:])
    again, other = (lane_documents(all_steps(config, seed=s, **one_lane), 0) for s in (7, 8))
    assert again == order and other != order
    plain = make_config(path, epochs=2, shuffle=False)
    assert lane_documents(all_steps(plain, **one_lane), 0) == make_documents(100) * 2


def test_shuffled_order_is_pinned():
    """Checkpoints rely on it: other numbers here need a new format of the lane state."""
    assert permutation(8, combine(3, 5)).tolist() == [2, 1, 4, 5, 7, 6, 0, 3]
    assert combine(1, 2, 3) == 7938547782994947800
    assert sorted(permutation(1000, 5)) == list(range(1000))


def test_a_step_takes_the_same_of_every_lane(tmp_path):
    path = write_jsonl(tmp_path, make_documents(60))
    run = Run(make_config(path))
    assert run.step().shape == (GLOBAL_BATCH // NUM_LANES, NUM_LANES, 48)


@pytest.mark.parametrize(("lanes", "wanted", "used"), [(8, 3, 2), (6, 4, 3), (5, 4, 1), (4, 0, 0)])
def test_workers_share_lanes_evenly(lanes, wanted, used):
    assert workers_for(lanes, wanted) == used


def test_huge_line_files_are_cut_without_looking(tmp_path: Path, monkeypatch):
    """Where cuts are not moved to line starts beforehand, every line is still read exactly once."""
    monkeypatch.setattr(pieces, "_EAGER_PIECES", 0)
    monkeypatch.setattr(pieces, "SMALLEST_PIECE", 50)
    documents = make_documents(150)
    steps = all_steps(make_config(write_jsonl(tmp_path, documents), epochs=1))
    seen = [text for lane in range(NUM_LANES) for text in lane_documents(steps, lane)]
    assert Counter(seen) == Counter(documents)


def test_steps_left_out_end_with_the_data(tmp_path: Path) -> None:
    """However long their range is, and on ranks whose data end sooner."""
    path = write_jsonl(tmp_path, make_documents(30))
    config = make_config(path, epochs=1)
    num_steps = len(list(Run(config).steps()))
    skip = {"data": config.data.model_copy(update={"skip": ("2-1000000000000", "7-9")})}
    run = Run(config.model_copy(update=skip), dp=2)
    assert num_steps > 3 and len(list(run.steps())) == 1
    assert [loader.next_step().data_step for loader in run.loaders] == [10**12 + 2] * 2
