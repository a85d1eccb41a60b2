"""Runs that start from an adapter of PEFT's, and what they need of it later."""

import shutil
from pathlib import Path

import pytest
import torch

from tests.distributed import runs
from tests.distributed.test_preference_runs import DPO, write_pairs
from tests.foreign import args_of, random_weights, write_hf
from torchtitan.handlers.peft import write_peft
from torchtitan.handlers.settings import LoraSettings
from torchtitan.models.registry import get_family

ARGS = args_of(n_layers=2, dim=32, n_heads=4, n_kv_heads=4, head_dim=8, ffn_dim=96, vocab_size=264)
MODEL = [f"--model.args.{name}={getattr(ARGS, name)}" for name in ("n_kv_heads", "ffn_dim")]
MODEL += ["--model.tokenizer_path=bytes", "--model.handlers=lora", "--lr_scheduler.warmup_steps=1"]
MODEL += ["--handlers.lora.rank=4", "--handlers.lora.alpha=8"]
MODEL += ['--handlers.lora.targets=["wq", "wk"]']


def write_adapter(folder: Path, scale: float) -> None:
    """Write random adapters of queries and keys."""
    adapters = {}
    for name in (f"layers.{layer}.attention.{linear}" for layer in "01" for linear in ("wq", "wk")):
        adapters[f"{name}.lora_a"] = torch.randn(4, 32)
        adapters[f"{name}.lora_b"] = scale * torch.randn(32, 4)
    folder.mkdir()
    settings, names = LoraSettings(rank=4, alpha=8.0), list(random_weights(ARGS))
    write_peft(folder, adapters, settings, get_family("llama3"), ARGS, weights=names, base="hf")


@pytest.fixture
def start(tmp_path: Path) -> list[str]:
    """The arguments of a run that starts from a base and an adapter."""
    weights = {n: w * (0.1 if w.dim() == 2 else 1) for n, w in random_weights(ARGS).items()}
    write_hf(tmp_path / "hf", weights, ARGS)
    write_adapter(tmp_path / "adapter", 1.0)
    base = f"--checkpoint.initial_load_path={tmp_path / 'hf'}"
    return [*MODEL, base, f"--handlers.lora.adapter={tmp_path / 'adapter'}"]


def test_a_resume_does_without_the_adapter(start: list[str], tmp_path: Path) -> None:
    """So does a run that starts from a step of adapters; a new one is refused."""
    runs.run(tmp_path / "run", *start, "--training.steps=1")
    shutil.rmtree(tmp_path / "adapter")
    refused = runs.run(tmp_path / "other", *start, "--training.steps=1", expect=2)
    assert "handlers.lora.adapter = " in refused.stderr and "cannot be read" in refused.stderr
    done = runs.run(tmp_path / "run", *start, "--training.steps=2")
    assert "Resumed from step 1" in done.stderr
    step = f"--checkpoint.initial_load_path={tmp_path / 'run' / 'checkpoint' / 'step-2'}"
    done = runs.run(tmp_path / "third", *start, step, "--training.steps=1")
    assert "What lora adds is in the checkpoint, so any other start" in done.stderr


def test_a_reference_with_another_adapter_is_refused(start: list[str], tmp_path: Path) -> None:
    words = (*DPO, *start, write_pairs(tmp_path / "pairs.jsonl"), "--handlers.lora.dropout=0")
    runs.run(tmp_path / "run", *words, "--training.steps=1")
    shutil.move(tmp_path / "adapter", tmp_path / "kept")
    more = (*words, "--training.steps=2")
    gone = runs.run(tmp_path / "run", *more, expect=2)
    assert "handlers.lora.adapter = " in gone.stderr
    write_adapter(tmp_path / "adapter", 0.5)
    other = runs.run(tmp_path / "run", *more, expect=4)
    assert "the run compared with other weights than those of" in other.stderr
    shutil.rmtree(tmp_path / "adapter")
    shutil.move(tmp_path / "kept", tmp_path / "adapter")
    runs.run(tmp_path / "run", *more)
