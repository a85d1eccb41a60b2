"""`torchtitan convert` between all formats: the same bits in the end."""

import json
from pathlib import Path
from typing import Any

import pytest
import torch
from safetensors.torch import load_file

from tests.foreign import random_weights, write_hf
from torchtitan.cli import main
from torchtitan.models.hf_weights import from_hf
from torchtitan.models.llama3 import LlamaArgs
from torchtitan.models.registry import get_family
from torchtitan.training.open_model import open_tensors
from torchtitan.weights.hf_config import to_hf_config
from torchtitan.weights.stored_model import read_tensors

SUFFIXES = {"hf": "", "meta": "", "dcp": "", "gguf": ".gguf", "pt": ".pt"}
SIZES = {"dim": 256, "n_layers": 6, "n_heads": 8, "n_kv_heads": 4}
ARGS = LlamaArgs(**SIZES, vocab_size=263)  # llama3/debugmodel
TIED = LlamaArgs(
    **{**SIZES, "n_layers": 2},
    vocab_size=263,
    tied_embeddings=True,
    rope_scaling_factor=4.0,
    rope_theta=10000.0,
    norm_eps=1e-6,
)


def make(folder: Path, args: LlamaArgs, scale: float = 0.05) -> None:
    weights = {
        name: weight * (scale if weight.dim() == 2 else 1)
        for name, weight in random_weights(args).items()
    }
    write_hf(folder, weights, args)
    config = to_hf_config(get_family("llama3"), args)
    (folder / "config.json").write_text(json.dumps(config))


def convert(source: Path, target: Path, *words: str) -> None:
    kind = next(kind for kind in SUFFIXES if kind in target.name)
    assert main(["convert", str(source), str(target), "--format", kind, *words]) == 0


def weights_of(folder: Path) -> dict[str, torch.Tensor]:
    return load_file(folder / "model.safetensors")


def assert_equal(one: dict[str, torch.Tensor], other: dict[str, torch.Tensor]) -> None:
    assert one.keys() == other.keys()
    assert all(torch.equal(one[name], other[name]) for name in one)


@pytest.fixture(scope="module")
def forms(tmp_path_factory: pytest.TempPathFactory) -> dict[str, Path]:
    """One model in every format."""
    folder = tmp_path_factory.mktemp("forms")
    make(folder / "hf", ARGS)
    paths = {kind: folder / f"{kind}{suffix}" for kind, suffix in SUFFIXES.items()}
    for kind, path in paths.items():
        if kind != "hf":
            convert(folder / "hf", path)
    return paths


@pytest.mark.parametrize("source", SUFFIXES)
@pytest.mark.parametrize("target", SUFFIXES)
def test_every_direction_keeps_every_bit(
    forms: dict[str, Path], tmp_path: Path, source: str, target: str
) -> None:
    out = tmp_path / f"{target}{SUFFIXES[target]}"
    convert(forms[source], out, "--model", "llama3/debugmodel")
    opened = open_tensors(out)
    found = dict(read_tensors(opened, opened.tensors))
    original = from_hf(weights_of(forms["hf"]), get_family("llama3").hf_weights, ARGS)
    assert_equal(found, original)


@pytest.mark.parametrize("kind", ["gguf", "hf"])
@pytest.mark.parametrize(
    "rope",
    [
        {},
        {"rope_scaling_type": "linear"},
        {"rope_scaling_type": "yarn"},
        {"rope_scaling_type": "yarn", "rope_attention_factor": 1.25},
    ],
    ids=str,
)
def test_tied_weights_and_scaled_rope(tmp_path: Path, kind: str, rope: dict[str, Any]) -> None:
    make(tmp_path / "in", TIED.model_copy(update=rope))
    between = tmp_path / f"{kind}{SUFFIXES[kind]}"
    convert(tmp_path / "in", between)
    convert(between, tmp_path / "back-hf")
    assert_equal(weights_of(tmp_path / "back-hf"), weights_of(tmp_path / "in"))
    configs = [json.loads((tmp_path / n / "config.json").read_text()) for n in ("in", "back-hf")]
    assert configs[0] == configs[1]


def test_metas_files_hold_a_tied_head_twice(tmp_path: Path) -> None:
    make(tmp_path / "in", TIED.model_copy(update={"rope_scaling_factor": 1.0}))
    convert(tmp_path / "in", tmp_path / "meta")
    held = torch.load(tmp_path / "meta" / "consolidated.00.pth", weights_only=True)  # noqa: TID251
    assert torch.equal(held["output.weight"], held["tok_embeddings.weight"])
    convert(tmp_path / "meta", tmp_path / "back-hf")
    assert_equal(weights_of(tmp_path / "back-hf"), weights_of(tmp_path / "in"))


def test_types(forms: dict[str, Path], tmp_path: Path) -> None:
    convert(forms["hf"], tmp_path / "a.gguf", "--dtype", "bfloat16")
    convert(tmp_path / "a.gguf", tmp_path / "b-hf", "--dtype", "bfloat16")
    original = weights_of(forms["hf"])
    for name, weight in weights_of(tmp_path / "b-hf").items():
        assert torch.equal(weight, original[name].bfloat16())


@pytest.mark.parametrize(
    ("words", "text"),
    [
        (("pt", "a", "--format=hf"), "name the model with --model FAMILY/FLAVOR"),
        (("pt", "a", "--model=llama3/8B", "--format=hf"), "tok_embeddings.weight is"),
        (("pt", "a", "--model=llama3/9B", "--format=hf"), "unknown flavor"),
        (("pt", "a", "--model=lama/8B", "--format=hf"), "unknown model family"),
        (("hf",), "takes IN and OUT, not 1 paths"),
        (("hf", "a", "b"), "takes IN and OUT, not 3 paths"),
        (("hf", "a", "--format=onnx"), "invalid choice"),
        (("gone", "a"), "does not exist"),
    ],
)
def test_bad_arguments(
    forms: dict[str, Path], tmp_path: Path, capsys: Any, words: tuple[str, ...], text: str
) -> None:
    paths = [str(forms.get(words[0], tmp_path / words[0]))]
    rest = [word if word.startswith("-") else str(tmp_path / word) for word in words[1:]]
    assert main(["convert", *paths, *rest]) != 0
    assert text in capsys.readouterr().err
    assert list(tmp_path.iterdir()) == []


def test_what_a_format_cannot_hold(tmp_path: Path, capsys: Any) -> None:
    make(tmp_path / "in", TIED.model_copy(update={"sliding_window": 16}))
    cases = {
        "gguf": "not for a sliding window",
        "meta": "Meta's code has no sliding window",
    }
    for kind, text in cases.items():
        out = str(tmp_path / f"out{SUFFIXES[kind]}")
        assert main(["convert", str(tmp_path / "in"), out, "--format", kind]) == 4
        assert text in capsys.readouterr().err
    for name, value in {"rope_beta_fast": 8.0, "rope_truncate": False}.items():
        changed = {"rope_scaling_type": "yarn", name: value}
        make(tmp_path / name, TIED.model_copy(update=changed))
        out = str(tmp_path / "out.gguf")
        assert main(["convert", str(tmp_path / name), out, "--format", "gguf"]) == 4
        assert f"not for {name} = {value}" in capsys.readouterr().err
    make(tmp_path / "scaled", TIED)
    out = str(tmp_path / "out")
    assert main(["convert", str(tmp_path / "scaled"), out, "--format", "meta"]) == 4
    assert "rope_scaling_factor is 8.0, not 4.0" in capsys.readouterr().err
    assert sorted(path.name for path in tmp_path.iterdir()) == [
        "in",
        "rope_beta_fast",
        "rope_truncate",
        "scaled",
    ]
