"""Runs on a file of pairs: on several meshes, resumed, validated; and what is refused."""

import json
from pathlib import Path

import pytest

from tests.chat_data import pair_rows, write_rows
from tests.distributed import runs
from tests.foreign import args_of, random_weights, write_hf
from tests.forked import execute

ARGS = args_of(n_layers=2, dim=32, n_heads=4, n_kv_heads=4, head_dim=8, ffn_dim=96, vocab_size=264)
DPO = (
    "--data.format=preference",
    "--loss.name=dpo",
    "--loss.args.beta=0.5",
    "--training.dataset=json",
    "--training.seq_len=256",
    "--training.global_batch_size=4",
    "--optimizer.lr=0.01",
    "--model.tokenizer_path=bytes",
)
START = (*(f"--model.args.{name}={getattr(ARGS, name)}" for name in ("n_kv_heads", "ffn_dim")),)
REWARDS = [f"rewards/{name}" for name in ("chosen", "rejected", "margins", "accuracies")]
TERMS = [f"loss/{name}" for name in REWARDS]
VALIDATED = [f"validation/{name}" for name in ("loss", "num_targets", *REWARDS)]


def write_pairs(path: Path, number: int = 64) -> str:
    """Ask for a letter: right is the capital, wrong the small one, twice."""
    rows = []
    for index in range(number):
        letter = chr(ord("a") + index % 26)
        rows.append({"prompt": letter, "chosen": letter.upper(), "rejected": 2 * letter})
    path.write_text("".join(json.dumps(row) + "\n" for row in rows))
    return f"--training.dataset_path={path}"


def write_start(folder: Path, scale: float = 0.1) -> None:
    weights = {
        name: weight * (scale if weight.dim() == 2 else 1)
        for name, weight in random_weights(ARGS).items()
    }
    write_hf(folder, weights, ARGS)


def curve(folder: Path, *keys: str) -> list[list[float]]:
    rows = [row for row in runs.records(folder) if keys[0] in row]
    return [[row[key] for key in keys] for row in rows]


def test_any_mesh_and_a_resume_on_another_one(tmp_path: Path) -> None:
    """The reference is loaded at every start: the weights that the run once started from. Or its
    log-probabilities are read, which another mesh has computed."""
    write_start(tmp_path / "hf")
    words = (*DPO, *START, write_pairs(tmp_path / "pairs.jsonl"))
    words += (f"--checkpoint.initial_load_path={tmp_path / 'hf'}", "--training.steps=6")
    # In float32 a reward, a small difference of large sums, has errors of 1e-5 of its own.
    types = ("dtype", "mixed_precision_param", "mixed_precision_reduce")
    words += tuple(f"--training.{name}=float64" for name in types)
    words += ("--validation.enable", "--validation.dataset=json", "--validation.freq=3")
    write_pairs(tmp_path / "held_out.jsonl", 32)
    words += (f"--validation.dataset_path={tmp_path / 'held_out.jsonl'}",)
    whole = runs.run(tmp_path / "whole", *words)
    assert "The loss compares with a frozen model, in float64: " in whole.stderr
    losses = curve(tmp_path / "whole", "loss", "grad_norm", *TERMS)
    assert losses[0][0] == pytest.approx(0.6931472, rel=1e-6), "it starts as the reference"
    assert losses[0][2:] == [0.0] * 4 and losses[-1][4] > 0.2 and losses[-1][5] > 0.7
    [_, last] = validated = curve(tmp_path / "whole", *VALIDATED)
    assert last[0] < losses[0][0] - 0.05 and last[1] == 32
    assert last[4] == pytest.approx(last[2] - last[3], rel=1e-6) and last[4] > 0.2
    assert 0.7 < last[5] <= 1 and last[5] * 32 == pytest.approx(round(last[5] * 32))
    assert "validation/perplexity" not in runs.records(tmp_path / "whole")[-1]

    parts = (*words, "--checkpoint.interval=3", f"--loss.args.reference_cache={tmp_path / 'kept'}")
    mesh = ("--parallelism.tensor_parallel_degree=2",)
    first = runs.run(tmp_path / "parts", *parts, "--training.steps=3", *mesh, processes=2)
    assert first.stderr.count("Computes the reference's log-probabilities of ") == 2
    assert "log-probabilities of training data once" in first.stderr
    mesh = ("--parallelism.context_parallel_degree=2",)
    second = runs.run(tmp_path / "parts", *parts, *mesh, processes=2)
    assert "Computes" not in second.stderr and "frozen model" not in second.stderr
    assert len(list((tmp_path / "kept").iterdir())) == 2, "of training and validation"
    parts_losses = curve(tmp_path / "parts", "loss", "grad_norm", *TERMS)
    parts_validated = curve(tmp_path / "parts", *VALIDATED)
    for one, other in zip(losses + validated, parts_losses + parts_validated, strict=True):
        assert other == pytest.approx(one, rel=1e-9, abs=1e-9)

    (tmp_path / "hf").rename(tmp_path / "moved")
    longer = (*words, "--training.steps=7")
    gone = runs.run(tmp_path / "whole", *longer, expect=2)
    assert "loss.args.reference_path" in gone.stderr and "does not exist" in gone.stderr
    write_start(tmp_path / "hf", scale=0.2)
    other = runs.run(tmp_path / "whole", *longer, expect=4)
    assert "the run compared with other weights than those of" in other.stderr
    moved = f"--loss.args.reference_path={tmp_path / 'moved'}"
    third = runs.run(tmp_path / "whole", *longer, moved, parts[-1])
    assert "Computes" not in third.stderr and "frozen model" not in third.stderr
    assert len(curve(tmp_path / "whole", "loss")) == 7


def test_a_stop_while_the_reference_is_computed(tmp_path: Path) -> None:
    words = (*DPO, *START, write_pairs(tmp_path / "pairs.jsonl"), "--training.max_seconds=0.001")
    words += (f"--loss.args.reference_cache={tmp_path / 'kept'}", "--training.steps=2")
    done = runs.run(tmp_path / "run", *words, expect=7)
    assert "Computes the reference" in done.stderr and "before the first step" in done.stderr
    assert not (tmp_path / "kept").exists()


def test_a_reference_is_not_added_later(tmp_path: Path) -> None:
    """A run that compares with the initial weights of the seed."""
    words = (*DPO, *START, write_pairs(tmp_path / "pairs.jsonl"))
    runs.run(tmp_path / "run", *words, "--training.steps=2")
    write_start(tmp_path / "hf")
    more = ("--training.steps=3", f"--loss.args.reference_path={tmp_path / 'hf'}")
    done = runs.run(tmp_path / "run", *words, *more, expect=4)
    assert "the run compared with other weights than those of" in done.stderr
    runs.run(tmp_path / "run", *words, "--training.steps=3")


def test_simpo_has_no_reference(tmp_path: Path) -> None:
    words = (*DPO, write_pairs(tmp_path / "pairs.jsonl"), "--loss.args.variant=simpo")
    done = runs.run(tmp_path / "run", *words, "--training.steps=3", "--checkpoint.enable=false")
    assert "frozen model" not in done.stderr
    losses = curve(tmp_path / "run", "loss", *TERMS)
    assert losses[-1][0] < losses[0][0] and losses[0][1] < 0, "log-probabilities themselves"


def test_batches_of_several_lengths_in_a_step(tmp_path: Path) -> None:
    """Each gets its own records: the start equals its reference."""
    path = write_rows(tmp_path, pair_rows(40))
    words = (*DPO, f"--training.dataset_path={path}", "--data.packing=false")
    words += ("--data.pad_to_multiple=2", "--training.steps=2", "--checkpoint.enable=false")
    words += ("--training.global_batch_size=16",)
    runs.run(tmp_path / "run", *words)
    losses = curve(tmp_path / "run", "loss", *TERMS)
    assert losses[0] == [pytest.approx(0.6931472, rel=1e-6), 0.0, 0.0, 0.0, 0.0]
    assert losses[1][3] != 0


@pytest.mark.parametrize("axis", ["tensor", "context", "pipeline"])
@pytest.mark.parametrize("loss", ["dpo", "distillation"])
def test_dry_runs(tmp_path: Path, axis: str, loss: str) -> None:
    """The model stands in for the frozen one that the loss needs."""
    write_start(tmp_path / "hf")
    words = [write_pairs(tmp_path / "pairs.jsonl"), f"--parallelism.{axis}_parallel_degree=2"]
    words += ["--comm.mode=fake_backend", *DPO]
    if loss == "distillation":
        words = [word for word in words if "loss" not in word and "format" not in word]
        words += [
            "--data.text_column=chosen",
            "--loss.name=distillation",
            f"--loss.args.teacher_path={tmp_path / 'hf'}",
        ]
    done = execute(
        runs.command(tmp_path / "run", *words),
        env=runs.environment() | {"WORLD_SIZE": "2", "RANK": "1"},
    )
    assert done.returncode == 0, done.stdout + done.stderr
    assert "runs on rank 1" in done.stdout


@pytest.mark.parametrize(
    ("more", "words"),
    [
        (["--data.format=chat"], 'data.format = "chat": the loss dpo compares two answers'),
        (["--training.document_mask=false"], "training.document_mask = false"),
        (["--loss.name=cross_entropy"], "trains on the rejected answers"),
        (["--loss.args.reference=base"], "no handler in model.handlers adds adapters"),
        (["--loss.args.reference_path=nowhere"], 'reference_path = "nowhere": does not exist'),
        (["--loss.args.reference_cache=pyproject.toml"], "reference_cache"),
        (["--loss.args.margin=1.0"], 'is not used by the variant "sigmoid"'),
        (["--data.on_long=split"], "a pair cannot be split"),
    ],
    ids=str,
)
def test_refusals(tmp_path: Path, more: list[str], words: str) -> None:
    given = [word for word in DPO if not (more == ["--loss.name=cross_entropy"] and "loss" in word)]
    pairs = write_pairs(tmp_path / "pairs.jsonl")
    done = runs.run(tmp_path / "run", *given, pairs, *more, expect=2)
    assert words in done.stderr, done.stderr


def test_equal_answers_are_named(tmp_path: Path) -> None:
    path = tmp_path / "pairs.jsonl"
    words = (*DPO, write_pairs(path), "--check")
    runs.run(tmp_path / "run", *words)
    lines = path.read_text().splitlines()
    lines[2] = json.dumps({"prompt": "a", "chosen": "b", "rejected": "b"})
    path.write_text("\n".join(lines))
    done = runs.run(tmp_path / "run", *words, expect=2)
    assert f"{path}:3 " in done.stderr, done.stderr
    assert "chosen and rejected are equal" in done.stderr, done.stderr
