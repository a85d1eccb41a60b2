"""Whole runs with adapters: on a base of another program, resumed on another mesh, refused."""

import re
import shutil
import sys
from pathlib import Path

from tests.distributed import runs
from tests.foreign import args_of, random_weights, write_hf
from tests.forked import execute
from tests.unit.hub_server import COMMIT, Hub, Repository
from torchtitan.checkpoint.manifest import base_of, read_manifest

ARGS = args_of(n_layers=2, dim=32, n_heads=4, n_kv_heads=2, head_dim=8, ffn_dim=96, vocab_size=264)
MODEL = [f"--model.args.{name}={getattr(ARGS, name)}" for name in ("n_kv_heads", "ffn_dim")]
MODEL += ["--model.tokenizer_path=bytes", "--model.handlers=lora", "--handlers.lora.dropout=0.1"]


def start(tmp_path: Path, base: str, *arguments: str, processes: int = 1):
    path = f"--checkpoint.initial_load_path={tmp_path / base}"
    words = runs.command(tmp_path / "run", path, *MODEL, *arguments, processes=processes)
    return execute(words, env=runs.environment())


def test_a_run_resumes_on_another_mesh_while_its_base_is_there(tmp_path: Path) -> None:
    weights = {n: w * (0.1 if w.dim() == 2 else 1) for n, w in random_weights(ARGS).items()}
    write_hf(tmp_path / "hf", weights, ARGS)
    done = start(tmp_path, "hf", "--training.steps=2")
    assert done.returncode == 0, done.stderr
    assert "Initialised 28 tensors that handlers add" in done.stderr
    assert re.search(r"M parameters, \d\.\d M of them trained\) with lora on cpu \(", done.stderr)
    assert "torchtitan export --merge " in done.stderr
    (tmp_path / "hf").rename(tmp_path / "moved")
    refused = start(tmp_path, "hf", "--training.steps=4", "--check")
    assert refused.returncode == 2
    assert f"refer to the base model {tmp_path / 'hf'}, which is missing" in refused.stderr
    split = "--parallelism.tensor_parallel_degree=2"
    again = start(tmp_path, "moved", "--training.steps=4", split, processes=2)
    assert again.returncode == 0, again.stderr
    assert "Resumed from step 2" in again.stderr
    assert f"What is frozen comes from {tmp_path / 'hf'}, or from where" in again.stderr


def test_a_base_of_the_hub_is_fetched_again(tmp_path: Path) -> None:
    """Though the branch has moved on: checkpoints know the commit."""
    weights = {n: w * (0.1 if w.dim() == 2 else 1) for n, w in random_weights(ARGS).items()}
    write_hf(tmp_path / "hf", weights, ARGS)
    files = {file.name: file.read_bytes() for file in (tmp_path / "hf").iterdir()}
    repository = Repository(files)
    with Hub({"mine/base": repository}) as hub:
        cache = tmp_path / "cache"
        environment = {"HF_ENDPOINT": hub.url, "HF_HOME": str(cache), "HF_HUB_OFFLINE": ""}

        def train(steps: int) -> str:
            path = "--checkpoint.initial_load_path=hf://mine/base"
            words = runs.command(tmp_path / "run", path, *MODEL, f"--training.steps={steps}")
            done = execute(words, env={**runs.environment(), **environment})
            assert done.returncode == 0, done.stderr
            return done.stderr

        train(2)
        step = tmp_path / "run" / "checkpoint" / "step-2"
        recorded = base_of(read_manifest(step))
        assert recorded is not None and recorded["hub"] == f"hf://mine/base@{COMMIT}"
        shutil.rmtree(cache)
        again = train(4)
        assert "Resumed from step 2" in again and f"downloading hf://mine/base@{COMMIT}" in again
        hub.sent.clear()
        words = [sys.executable, "-m", "torchtitan", "export", str(step), str(tmp_path / "merged")]
        done = execute([*words, "--merge"], env={**runs.environment(), **environment})
        assert done.returncode == 0 and not hub.sent, done.stderr  # the cache has it
