"""GGUF files in llama.cpp, through the package xllamacpp: skipped where that is not installed."""

import json
from pathlib import Path
from typing import Any

import pytest

from tests.foreign import args_of, random_weights, write_hf
from torchtitan.cli import main
from torchtitan.models.decoder.args import DecoderArgs

xllamacpp = pytest.importorskip("xllamacpp", reason="xllamacpp is not installed")

TOKENIZER = Path(__file__).parents[2] / "assets" / "tokenizer"
PROMPTS = (
    "The capital of France is",
    "Once upon a time there was a",
    "def fibonacci(n):",
    "Water boils at 100 degrees, and it freezes at",
)
LONG = ("one two three four five six seven eight nine ten " * 60,)


def by_llama_cpp(file: Path, prompts: tuple[str, ...], length: int) -> list[str]:
    params = xllamacpp.CommonParams()
    params.model.path = str(file)
    params.n_ctx, params.n_parallel, params.cpuparams.n_threads = 2048, 1, 1
    params.warmup = False
    f32 = xllamacpp.ggml_type.GGML_TYPE_F32  # its cache is float16 by default
    params.cache_type_k = params.cache_type_v = f32
    server = xllamacpp.Server(params)
    found = []
    for prompt in prompts:
        asked = {"prompt": prompt, "n_predict": length, "temperature": 0}
        found.append(server.handle_completions(asked)["choices"][0]["text"])
    return found


def by_us(
    model: Path, tokenizer: Path, folder: Path, prompts: tuple[str, ...], length: int
) -> list[str]:
    output = folder / "out.jsonl"
    words = ["generate", str(model), f"--tokenizer={tokenizer}", "--dtype=float32", *prompts]
    assert main([*words, f"--max-new-tokens={length}", f"--output={output}"]) == 0
    return [json.loads(line)["completion"] for line in output.read_text().splitlines()]


@pytest.mark.parametrize(("dtype", "prompts"), [("float32", PROMPTS), ("bfloat16", PROMPTS[:1])])
def test_smollm2_writes_the_same_text(
    smollm2: Path, tmp_path: Path, dtype: str, prompts: tuple[str, ...]
) -> None:
    file = tmp_path / "model.gguf"
    assert main(["export", str(smollm2), str(file), "--dtype", dtype]) == 0
    assert by_us(file, smollm2, tmp_path, prompts, 24) == by_llama_cpp(file, prompts, 24)


SIZES = {"dim": 128, "n_heads": 4, "n_kv_heads": 2, "head_dim": 32, "ffn_dim": 256}
SCALED = {"rope_theta": 10000.0, "rope_scaling_factor": 8.0, "max_seq_len": 131072}
RANDOM: dict[str, tuple[str, dict[str, Any], tuple[str, ...]]] = {
    "llama": ("llama3", {}, PROMPTS),
    "scaled llama": ("llama3", SCALED, LONG),
    "qwen3": ("qwen3", {}, PROMPTS),
    "tied qwen3": ("qwen3", {"tied_embeddings": True, "head_dim": 48}, PROMPTS),
}


def make(folder: Path, family: str, args: DecoderArgs) -> None:
    """A random model whose next token depends on the order of the tokens before it."""
    weights = {
        name: weight * (0.15 if weight.dim() == 2 else 1)
        for name, weight in random_weights(args, family).items()
    }
    write_hf(folder, weights, args, family)


@pytest.mark.parametrize("case", RANDOM)
def test_a_random_model_writes_the_same_text(tmp_path: Path, case: str) -> None:
    family, more, prompts = RANDOM[case]
    args = args_of(family, **{**SIZES, "vocab_size": 2016, **more})
    make(tmp_path / "in", family, args)
    file = tmp_path / "model.gguf"
    words = ["export", str(tmp_path / "in"), str(file), f"--tokenizer={TOKENIZER}"]
    assert main(words) == 0
    ours = by_us(tmp_path / "in", TOKENIZER, tmp_path, prompts, 16)
    assert ours == by_llama_cpp(file, prompts, 16)
    assert len(set(ours)) == len(prompts)
