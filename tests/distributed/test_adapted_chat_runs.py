"""Adapters trained on conversations and on pairs: validated, and resumed on other meshes."""

from pathlib import Path

import pytest

from tests.chat_data import chat_rows, pair_rows, write_rows
from tests.distributed import runs
from tests.distributed.test_chat_runs import CHAT
from tests.foreign import args_of, random_weights, write_hf

ARGS = args_of(n_layers=2, dim=32, n_heads=4, n_kv_heads=2, head_dim=8, ffn_dim=96, vocab_size=264)
ADAPTERS = (
    *(f"--model.args.{name}={getattr(ARGS, name)}" for name in ("n_kv_heads", "ffn_dim")),
    "--model.tokenizer_path=bytes",
    "--model.handlers=lora",
    "--handlers.lora.dropout=0.2",
    "--handlers.lora.dora=true",
    "--handlers.lora.rank=3",
    "--optimizer.lr=0.02",
    "--lr_scheduler.decay_ratio=0",
    "--checkpoint.interval=2",
    "--validation.enable",
    "--validation.dataset=auto",
    "--validation.freq=2",
)
PAIRS = ("--loss.name=dpo", "--loss.args.reference=base", "--loss.args.beta=0.5")


@pytest.mark.parametrize("format", ["chat", "preference"])
def test_resumed_on_other_meshes(format: str, tmp_path: Path) -> None:
    weights = {n: w * (0.1 if w.dim() == 2 else 1) for n, w in random_weights(ARGS).items()}
    write_hf(tmp_path / "hf", weights, ARGS)
    rows = pair_rows if format == "preference" else chat_rows
    words = (*CHAT, *ADAPTERS, *(PAIRS if format == "preference" else ()))
    words += (f"--data.format={format}", f"--checkpoint.initial_load_path={tmp_path / 'hf'}")
    words += (f"--training.dataset_path={write_rows(tmp_path, rows(60))}", "--training.seq_len=192")
    words += (f"--validation.dataset_path={write_rows(tmp_path, rows(9), 'held_out.jsonl')}",)
    runs.run(tmp_path / "whole", *words, "--training.steps=6")
    for steps, mesh in ((2, ()), (4, ("tensor",)), (6, ("data_parallel_shard",))):
        degrees = [
            f"--parallelism.{name}_degree=2".replace("tensor", "tensor_parallel") for name in mesh
        ]
        processes = 2 if mesh else 1
        runs.run(
            tmp_path / "parts", *words, f"--training.steps={steps}", *degrees, processes=processes
        )
    whole, parts = (
        [
            [value for name, value in sorted(record.items()) if "loss" in name or "norm" in name]
            for record in runs.records(tmp_path / name)
        ]
        for name in ("whole", "parts")
    )
    assert len(whole) == len(parts) == 9, "six steps and three validations"
    for one, other in zip(whole, parts):
        assert other == pytest.approx(one, rel=1e-9)
