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


def serve(file: Path) -> Any:
    """Return llama.cpp's server of a model, which holds keys and values in float32."""
    params = xllamacpp.CommonParams()
    params.model.path = str(file)
    params.n_ctx, params.n_parallel, params.cpuparams.n_threads = 2048, 1, 1
    params.warmup = False
    f32 = xllamacpp.ggml_type.GGML_TYPE_F32  # its cache is float16 by default
    params.cache_type_k = params.cache_type_v = f32
    return xllamacpp.Server(params)


def by_llama_cpp(file: Path, prompts: tuple[str, ...], length: int) -> list[str]:
    server, found = serve(file), []
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
STRETCHED = {
    "rope_scaling_type": "yarn",
    "rope_scaling_factor": 4.0,
    "rope_original_max_seq_len": 128,
    "max_seq_len": 2048,
}
RANDOM: dict[str, tuple[str, dict[str, Any], tuple[str, ...]]] = {
    "llama": ("llama3", {}, PROMPTS),
    "scaled llama": ("llama3", SCALED, LONG),
    "qwen3": ("qwen3", {}, PROMPTS),
    "stretched qwen3": ("qwen3", STRETCHED, LONG),
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


YARN = {"rope_type": "yarn", "factor": 4.0, "original_max_position_embeddings": 64}
SCALINGS = [
    {"rope_type": "linear", "factor": 1.5},
    YARN,
    {**YARN, "attention_factor": 1.0},
]


def with_rope(folder: Path, scaling: dict[str, Any], copy: Path) -> Path:
    """The model with a scaling of RoPE that it was not trained with."""
    copy.mkdir()
    for file in folder.iterdir():
        if file.name != "config.json":
            (copy / file.name).symlink_to(file.resolve())
    config = json.loads((folder / "config.json").read_text())
    config |= {"rope_theta": 1e5, "rope_scaling": scaling, "rope_parameters": None}
    (copy / "config.json").write_text(json.dumps(config))
    return copy


@pytest.mark.parametrize("scaling", SCALINGS, ids=["linear", "yarn", "yarn not sharpened"])
def test_llama_cpp_stretches_rope_alike(
    smollm2: Path, tmp_path: Path, scaling: dict[str, Any]
) -> None:
    """Probabilities of the next token; what it computes in float32 is right to about 0.01."""
    transformers = pytest.importorskip("transformers")
    folder = with_rope(smollm2, scaling, tmp_path / "in")
    assert main(["export", str(folder), str(tmp_path / "model.gguf"), "--dtype=float32"]) == 0
    server, prompt = serve(tmp_path / "model.gguf"), " ".join(PROMPTS * 2)
    asked = {"prompt": prompt, "n_predict": 1, "temperature": 0, "logprobs": 5}
    [first] = server.handle_completions(asked)["choices"][0]["logprobs"]["content"]
    theirs = {token["id"]: token["logprob"] for token in first["top_logprobs"]}
    tokenizer = transformers.AutoTokenizer.from_pretrained(folder)
    model = transformers.AutoModelForCausalLM.from_pretrained(folder, dtype="float32")
    logits = model(**tokenizer(prompt, return_tensors="pt")).logits[0, -1]
    expected = logits.log_softmax(-1)
    assert len(theirs) == 5
    assert theirs == pytest.approx({n: expected[n].item() for n in theirs}, abs=0.03)
