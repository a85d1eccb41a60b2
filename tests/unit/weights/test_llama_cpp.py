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


def by_llama_cpp(file: Path) -> list[str]:
    xllamacpp = pytest.importorskip("xllamacpp", reason="xllamacpp is not installed")
    params = xllamacpp.CommonParams()
    params.model.path = str(file)
    params.n_ctx, params.n_parallel, params.cpuparams.n_threads = 512, 1, 1
    f32 = xllamacpp.ggml_type.GGML_TYPE_F32  # its cache is float16 by default
    params.cache_type_k = params.cache_type_v = f32
    server = xllamacpp.Server(params)
    found = []
    for prompt in PROMPTS:
        asked = {"prompt": prompt, "n_predict": LENGTH, "temperature": 0}
        found.append(server.handle_completions(asked)["choices"][0]["text"])
    return found


YARN = {"rope_type": "yarn", "factor": 4.0, "original_max_position_embeddings": 64}
SHARPENED = {**YARN, "attention_factor": 1.3}


def with_rope(folder: Path, scaling: dict[str, Any], copy: Path) -> Path:
    """The model with another scaling of RoPE, which it was not trained with."""
    copy.mkdir()
    for file in folder.iterdir():
        (copy / file.name).symlink_to(file)
    config = json.loads((folder / "config.json").read_text())
    config = {k: v for k, v in config.items() if k != "rope_parameters"}
    config |= {"rope_theta": 1e5, "rope_scaling": scaling}
    (copy / "config.json").unlink()
    (copy / "config.json").write_text(json.dumps(config))
    return copy


@pytest.mark.parametrize(
    ("dtype", "scaling"),
    [("float32", None), ("bfloat16", None), ("float32", YARN), ("float32", SHARPENED)],
    ids=["float32", "bfloat16", "yarn", "yarn sharpened"],
)
def test_llama_cpp_writes_the_same_text(
    smollm2: Path,  # noqa: F811
    tmp_path: Path,
    dtype: str,
    scaling: dict[str, Any] | None,
    capsys: pytest.CaptureFixture[str],
) -> None:
    pytest.importorskip("xllamacpp", reason="xllamacpp is not installed")
    file = tmp_path / "model.gguf"
    folder = smollm2 if scaling is None else with_rope(smollm2, scaling, tmp_path / "scaled")
    assert main(["export", str(folder), str(file), "--dtype", dtype]) == 0
    theirs = by_llama_cpp(file)
    capsys.readouterr()
    output = tmp_path / "out.jsonl"
    words = ["generate", str(file), f"--tokenizer={smollm2}", "--dtype=float32", *PROMPTS]
    assert main([*words, f"--max-new-tokens={LENGTH}", f"--output={output}"]) == 0
    ours = [json.loads(line)["completion"] for line in output.read_text().splitlines()]
    assert ours == theirs
