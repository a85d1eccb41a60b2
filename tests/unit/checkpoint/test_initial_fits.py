"""Whether weights to start from fit the model is known before anything starts."""

from collections.abc import Mapping
from pathlib import Path
from typing import Any

import pytest
import torch
import torch.distributed.checkpoint as dcp
from folders import make_config

from tests.foreign import write_hf
from torchtitan.config.run_context import RunContext
from torchtitan.models.decoder.args import DecoderArgs
from torchtitan.models.registry import get_family
from torchtitan.preflight.checkpoint import check_model
from torchtitan.preflight.model import build_on_meta

ARGS = {"n_layers": 2, "dim": 32, "n_heads": 4}


def save_weights(
    folder: Path, instead: Mapping[str, dict[str, torch.Tensor]] | None = None, **more: Any
) -> None:
    """Weights of a model of `ARGS`, with the vocabulary of bytes; `instead` replaces some."""
    args = get_family("llama3").resolve_args("debugmodel", {**ARGS, **more}, 264)
    with torch.device("meta"):
        model = get_family("llama3").build(args)
    weights = {
        name: torch.zeros(t.shape, dtype=torch.bfloat16) for name, t in model.state_dict().items()
    }
    for name, others in (instead or {}).items():
        weights |= others
        del weights[name]
    dcp.save(weights, checkpoint_id=folder, no_dist=True)


def told(folder: Path, args: dict[str, Any], **model: Any) -> str:
    config = make_config(
        folder.parent / "run",
        checkpoint={"initial_load_path": str(folder)},
        model={"args": args, **model},
    )
    context = RunContext(config, 1, "cpu")
    return "\n".join(str(issue) for issue in check_model(context, build_on_meta(context)))


def test_weights_that_fit(tmp_path: Path) -> None:
    """The vocabulary is the tokenizer's, and number formats are converted."""
    save_weights(tmp_path / "weights")
    assert told(tmp_path / "weights", ARGS) == ""
    assert told(tmp_path / "weights", ARGS | {"vocab_size": 264}) == ""
    assert told(tmp_path / "weights", ARGS, handlers=["compile"]) == ""


@pytest.mark.parametrize(
    ("change", "words"),
    [
        ({"dim": 64}, "is bfloat16 [264, 32] in it, bfloat16 [264, 64] in the run"),
        ({"n_layers": 3}, "layers.2.attention.wk.weight is not in it"),
        ({"n_layers": 1}, "layers.1.attention.wk.weight is only in it"),
        ({"vocab_size": 300}, "is bfloat16 [264, 32] in it, bfloat16 [300, 32] in the run"),
    ],
    ids=lambda value: str(value)[:20],
)
def test_weights_of_another_model(tmp_path: Path, change: dict[str, Any], words: str) -> None:
    save_weights(tmp_path / "weights")
    text = told(tmp_path / "weights", ARGS | change)
    assert text.startswith(f'checkpoint.initial_load_path = "{tmp_path / "weights"}": does not fit')
    assert words in text and "Fix: choose another checkpoint, or the flavor" in text


def test_weights_below_adapters(tmp_path: Path) -> None:
    """Handlers with adapters load the plain model, also from a run of theirs without a base."""
    save_weights(tmp_path / "weights")
    for handler in ("lora", "qlora"):
        assert told(tmp_path / "weights", ARGS, handlers=[handler]) == ""
        text = told(tmp_path / "weights", ARGS | {"dim": 64}, handlers=[handler])
        assert "is bfloat16 [264, 32] in it, bfloat16 [264, 64] in the run" in text
    shapes = {"weight_nf4": (32, 16), "weight_scale": (32, 1), "lora_a": (8, 32), "lora_b": (32, 8)}
    linear = "layers.1.attention.wq"
    adapted = {f"{linear}.{name}": torch.zeros(shape) for name, shape in shapes.items()}
    save_weights(tmp_path / "whole", instead={f"{linear}.weight": adapted})
    assert told(tmp_path / "whole", ARGS, handlers=["qlora"]) == ""
    text = told(tmp_path / "whole", ARGS | {"n_layers": 1}, handlers=["qlora"])
    assert "layers.1.attention.wk.weight is only in it" in text


def test_weights_of_hugging_face(tmp_path: Path) -> None:
    """Headers are read, also where a handler changes the model; rows are padded only if asked."""
    args = get_family("llama3").resolve_args("debugmodel", ARGS, 264)
    assert isinstance(args, DecoderArgs)
    with torch.device("meta"):
        model = get_family("llama3").build(args)
    weights = {name: torch.zeros(tensor.shape) for name, tensor in model.state_dict().items()}
    folder = tmp_path / "weights"
    write_hf(folder, weights, args, num_shards=2)
    assert told(folder, ARGS) == ""
    assert told(folder, ARGS | {"vocab_size": 300}) == ""
    assert "is float32 [264, 32] in it, float32 [200, 32]" in told(
        folder, ARGS | {"vocab_size": 200}
    )
    assert "layers.1.attention.wk.weight is only in it" in told(folder, ARGS | {"n_layers": 1})
    assert told(folder, ARGS | {"tied_embeddings": True}) == ""  # compared when it is loaded
    next(folder.glob("*.safetensors")).unlink()
    for handlers in ([], ["own"]):
        text = told(folder, ARGS, handlers=handlers)
        assert "cannot be loaded" in text and "is missing, which model.safetensors.index" in text


def test_what_is_not_looked_at(tmp_path: Path) -> None:
    """A handler may add parameters; a damaged folder is told as such."""
    save_weights(tmp_path / "weights")
    assert told(tmp_path / "weights", ARGS | {"dim": 64}, handlers=["own"]) == ""
    (tmp_path / "weights" / ".metadata").write_bytes(b"no pickle")
    assert "is damaged" in told(tmp_path / "weights", ARGS)
