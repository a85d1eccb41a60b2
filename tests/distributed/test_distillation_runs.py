"""Runs with a teacher: on two meshes, resumed, and what is refused."""

import json
import shutil
from pathlib import Path

import pytest

from tests.distributed import runs
from tests.foreign import args_of, random_weights, write_hf
from torchtitan.data.tokenizers import build_tokenizer

SIZES = {"n_layers": 2, "dim": 16, "n_heads": 2, "n_kv_heads": 2, "head_dim": 8, "ffn_dim": 48}
TOKENIZER = Path(__file__).parents[1] / "assets" / "tokenizer"
KEYS = ("loss", "loss/divergence", "loss/cross_entropy", "grad_norm")


def write_teacher(folder: Path, scale: float = 0.3, vocab_size: int = 264) -> str:
    args = args_of("qwen3", **SIZES, vocab_size=vocab_size)
    weights = {
        name: weight * (scale if weight.dim() == 2 else 1)
        for name, weight in random_weights(args, "qwen3").items()
    }
    write_hf(folder, weights, args, "qwen3")
    return f"--loss.args.teacher_path={folder}"


def curve(folder: Path) -> list[list[float]]:
    return [[row[key] for key in KEYS] for row in runs.records(folder) if "loss" in row]


@pytest.mark.parametrize("top_k", [None, 20])
def test_any_mesh_and_a_resume_on_another_one(tmp_path: Path, top_k: int | None) -> None:
    words = ("--loss.name=distillation", "--loss.args.temperature=2.0")
    words += (write_teacher(tmp_path / "teacher"), "--model.tokenizer_path=bytes")
    words += ("--training.steps=8", "--optimizer.lr=0.01")
    words += () if top_k is None else (f"--loss.args.top_k={top_k}",)
    runs.run(tmp_path / "whole", *words)
    whole = curve(tmp_path / "whole")
    assert whole[-1][1] < whole[0][1] - 0.05
    for loss, divergence, cross_entropy, _ in whole:
        assert loss == pytest.approx(0.5 * divergence + 0.5 * cross_entropy, rel=1e-5)
    for axis, more in (
        ("pipeline", ()),
        ("tensor", ("--checkpoint.load_step=4", "--checkpoint.allow_rewind")),
    ):
        mesh = f"--parallelism.{axis}_parallel_degree=2"
        runs.run(tmp_path / "parts", *words, mesh, *more, processes=2)
    for one, other in zip(whole, curve(tmp_path / "parts"), strict=True):
        assert other == pytest.approx(one, rel=1e-4)
    write_teacher(tmp_path / "teacher", scale=0.2)
    changed = runs.run(tmp_path / "whole", *words, "--training.steps=9", expect=4)
    assert "the run compared with other weights than those of" in changed.stderr


@pytest.mark.parametrize(
    ("more", "words"),
    [
        ([], 'teacher_path = "TEACHER": has a vocabulary of 300 tokens, and the model of 264'),
        (["--loss.args.teacher_path=nowhere"], '= "nowhere": does not exist'),
        (["--loss.args.temperature=0.0"], "loss.args.temperature = 0.0"),
        (["--loss.args.weight=2.0"], "loss.args.weight = 2.0"),
        (["--data.format=preference"], "would train on the rejected answers, too"),
    ],
    ids=str,
)
def test_refusals(tmp_path: Path, more: list[str], words: str) -> None:
    teacher = write_teacher(tmp_path / "teacher", vocab_size=300)
    given = ["--loss.name=distillation", "--model.tokenizer_path=bytes"]
    given += [] if "teacher" in str(more) else [teacher]
    done = runs.run(tmp_path / "run", *given, *more, expect=2)
    assert words.replace("TEACHER", str(tmp_path / "teacher")) in done.stderr, done.stderr


def test_a_teacher_is_named_and_no_more_tokens_than_it_knows(tmp_path: Path) -> None:
    given = ["--loss.name=distillation", "--model.tokenizer_path=bytes"]
    unnamed = runs.run(tmp_path / "run", *given, expect=2)
    assert "teacher_path" in unnamed.stderr and "name the teacher's weights" in unnamed.stderr
    given += [write_teacher(tmp_path / "teacher"), "--loss.args.top_k=265"]
    done = runs.run(tmp_path / "run", *given, expect=2)
    assert "loss.args.top_k = 265: is more than the 264 tokens" in done.stderr


def test_a_check_knows_the_teachers_tokenizer(tmp_path: Path) -> None:
    """The same one, one in which two tokens have changed places, and a larger one."""
    size = build_tokenizer(str(TOKENIZER)).vocab_size
    teacher = tmp_path / "teacher"
    given = ["--loss.name=distillation", f"--model.tokenizer_path={TOKENIZER}", "--check"]
    given.append(write_teacher(teacher, vocab_size=size))
    shutil.copytree(TOKENIZER, teacher, dirs_exist_ok=True)
    runs.run(tmp_path / "run", *given)

    content = json.loads((TOKENIZER / "tokenizer.json").read_text())
    vocab = content["model"]["vocab"]
    vocab["a"], vocab["b"] = vocab["b"], vocab["a"]
    (teacher / "tokenizer.json").write_text(json.dumps(content))
    swapped = runs.run(tmp_path / "run", *given, expect=2)
    assert f'teacher_path = "{teacher}": was trained with another tokenizer' in swapped.stderr

    write_teacher(teacher, vocab_size=size + 8)
    larger = runs.run(tmp_path / "run", *given, expect=2)
    assert f"has a vocabulary of {size + 8} tokens, and the model of {size}" in larger.stderr
