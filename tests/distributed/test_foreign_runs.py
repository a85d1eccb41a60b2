"""Runs that start from a Hugging Face folder: what they log, and what ends them before a step."""

from pathlib import Path

import pytest
import torch

from tests.distributed import runs
from tests.foreign import args_of, random_weights, write_hf
from tests.forked import execute

ARGS = args_of(n_layers=2, dim=32, n_heads=4, n_kv_heads=4, head_dim=8, ffn_dim=96, vocab_size=264)
MODEL = [f"--model.args.{name}={getattr(ARGS, name)}" for name in ("n_kv_heads", "ffn_dim")]
MODEL += ["--model.tokenizer_path=bytes"]


def start(tmp_path: Path, *arguments: str, processes: int = 1):
    path = f"--checkpoint.initial_load_path={tmp_path / 'hf'}"
    words = runs.command(tmp_path / "run", path, *MODEL, *arguments, processes=processes)
    return execute(words, env=runs.environment())


def small_weights() -> dict[str, torch.Tensor]:
    return {
        name: weight.bfloat16() * (0.1 if weight.dim() == 2 else 1)
        for name, weight in random_weights(ARGS).items()
    }


def test_a_run_starts_from_a_folder_and_resumes_without_it(tmp_path: Path) -> None:
    write_hf(tmp_path / "hf", small_weights(), ARGS, num_shards=2)
    done = start(tmp_path, "--training.steps=4", processes=2)
    assert done.returncode == 0, done.stderr
    assert f"Loaded weights from {tmp_path / 'hf'}" in done.stderr
    assert "Weights are converted from bfloat16 to float32" in done.stderr
    (tmp_path / "hf").rename(tmp_path / "gone")
    again = start(tmp_path, "--training.steps=6")
    assert again.returncode == 0 and "Resumed from step 4" in again.stderr, again.stderr


def test_a_head_that_is_missing(tmp_path: Path) -> None:
    weights = {name: w for name, w in small_weights().items() if name != "output.weight"}
    write_hf(tmp_path / "hf", weights, ARGS)
    done = start(tmp_path, "--check")
    assert done.returncode == 2
    assert "output.weight is not in it (if it is the embedding, set model.args.tied" in done.stderr


def test_what_is_not_a_number_is_named(tmp_path: Path) -> None:
    weights = small_weights()
    weights["layers.1.attention.wk.weight"][17, 3] = float("nan")
    write_hf(tmp_path / "hf", weights, ARGS)
    done = start(tmp_path)
    assert done.returncode == 5
    assert "layers.1.attention.wk.weight" in done.stderr
    assert "Set checkpoint.initial_load_path to other weights" in done.stderr
    assert not list((tmp_path / "run").glob("checkpoint/step-*"))


@pytest.mark.parametrize(
    ("argument", "words"),
    [
        ("--model.args.n_layers=3", "layers.2.attention.wk.weight is not in it"),
        ("--checkpoint.initial_load_model_only=false", "which holds only a model"),
        ("--model.args.tied_embeddings=true", ""),
    ],
)
def test_check_reads_headers(tmp_path: Path, argument: str, words: str) -> None:
    write_hf(tmp_path / "hf", small_weights(), ARGS)
    done = start(tmp_path, argument, "--check")
    assert (done.returncode == 0) == (not words), done.stderr
    assert words in done.stderr


def test_the_last_step_is_exported(tmp_path: Path) -> None:
    words = ("--checkpoint.last_save_in_hf", "--training.steps=2")
    command = runs.command(tmp_path / "run", *words, processes=2)
    done = execute(command, env=runs.environment())
    assert done.returncode == 0, done.stderr
    assert "reads back with a KL divergence" in done.stderr
    assert (tmp_path / "run" / "hf" / "step-2" / "model.safetensors").is_file()
