"""A whole run over a quantised base: compiled, resumed on another mesh, and used."""

import sys
from pathlib import Path

from tests.distributed import runs
from tests.foreign import args_of, random_weights, write_hf
from tests.forked import execute

SIZES = {"n_layers": 2, "dim": 128, "n_heads": 4, "n_kv_heads": 2, "head_dim": 32, "ffn_dim": 256}
ARGS = args_of(**SIZES, vocab_size=264)
MODEL = [f"--model.args.{name}={SIZES[name]}" for name in ("dim", "n_heads", "n_kv_heads")]
MODEL += ["--model.args.ffn_dim=256", "--model.tokenizer_path=bytes"]
MODEL += ["--model.handlers=qlora,compile", "--handlers.compile.backend=aot_eager"]
MODEL += ["--training.mixed_precision_param=bfloat16", "--activation_checkpoint.mode=full"]


def test_a_run_in_bfloat16(tmp_path: Path) -> None:
    weights = {n: w * (0.1 if w.dim() == 2 else 1) for n, w in random_weights(ARGS).items()}
    write_hf(tmp_path / "hf", weights, ARGS)
    path = f"--checkpoint.initial_load_path={tmp_path / 'hf'}"

    def train(*arguments: str, processes: int = 1):
        words = runs.command(tmp_path / "run", path, *MODEL, *arguments, processes=processes)
        done = execute(words, env=runs.environment())
        assert done.returncode == 0, done.stderr
        return done

    train("--training.steps=2")
    again = train("--training.steps=4", processes=2)
    assert "Resumed from step 2" in again.stderr
    step = str(tmp_path / "run" / "checkpoint" / "step-4")
    words = [sys.executable, "-m", "torchtitan", "generate", step, "ab"]
    done = execute([*words, "--max-new-tokens=3"], env=runs.environment())
    assert done.returncode == 0, done.stderr
