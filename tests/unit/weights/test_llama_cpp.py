"""GGUF files in llama.cpp, through the package xllamacpp: skipped where that is not installed."""

import json
from pathlib import Path
from typing import Any

import pytest

from tests.smollm2 import smollm2  # noqa: F401
from torchtitan.cli import main

PROMPTS = (
    "The capital of France is",
    "Once upon a time there was a",
    "def fibonacci(n):",
    "Water boils at 100 degrees, and it freezes at",
)
LENGTH = 32


def serve(file: Path) -> Any:
    """Return llama.cpp's server of a model, which holds keys and values in float32."""
    xllamacpp = pytest.importorskip("xllamacpp", reason="xllamacpp is not installed")
    params = xllamacpp.CommonParams()
    params.model.path = str(file)
    params.n_ctx, params.n_parallel, params.cpuparams.n_threads = 512, 1, 1
    f32 = xllamacpp.ggml_type.GGML_TYPE_F32  # its cache is float16 by default
    params.cache_type_k = params.cache_type_v = f32
    return xllamacpp.Server(params)


def by_llama_cpp(file: Path) -> list[str]:
    server, found = serve(file), []
    for prompt in PROMPTS:
        asked = {"prompt": prompt, "n_predict": LENGTH, "temperature": 0}
        found.append(server.handle_completions(asked)["choices"][0]["text"])
    return found


@pytest.mark.parametrize("dtype", ["float32", "bfloat16"])
def test_llama_cpp_writes_the_same_text(
    smollm2: Path,  # noqa: F811
    tmp_path: Path,
    dtype: str,
    capsys: pytest.CaptureFixture[str],
) -> None:
    pytest.importorskip("xllamacpp", reason="xllamacpp is not installed")
    file = tmp_path / "model.gguf"
    assert main(["export", str(smollm2), str(file), "--dtype", dtype]) == 0
    theirs = by_llama_cpp(file)
    capsys.readouterr()
    output = tmp_path / "out.jsonl"
    words = ["generate", str(file), f"--tokenizer={smollm2}", "--dtype=float32", *PROMPTS]
    assert main([*words, f"--max-new-tokens={LENGTH}", f"--output={output}"]) == 0
    ours = [json.loads(line)["completion"] for line in output.read_text().splitlines()]
    assert ours == theirs


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
    smollm2: Path,  # noqa: F811
    tmp_path: Path,
    scaling: dict[str, Any],
) -> None:
    """Probabilities of the next token; what it computes in float32 is right to about 0.01."""
    pytest.importorskip("xllamacpp", reason="xllamacpp is not installed")
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
