"""`torchtitan export`: what other programs get, and what is refused."""

import json
from collections.abc import Mapping
from pathlib import Path
from typing import Any

import pytest
import torch
from safetensors.torch import load_file
from transformers import AutoConfig, AutoModelForCausalLM, AutoTokenizer, GenerationConfig

from tests.faults.damage import flip
from tests.pool import GlooPool
from torchtitan.checkpoint.state import model_tensors
from torchtitan.checkpoint.store import CheckpointStore
from torchtitan.cli import main
from torchtitan.config import JobConfig
from torchtitan.config.schema import Checkpoint
from torchtitan.distributed.context import DistributedContext
from torchtitan.distributed.parallel_dims import ParallelDims
from torchtitan.training import model_builder
from torchtitan.weights import model_card, writer

TOKENIZER = Path(__file__).parents[2] / "assets" / "tokenizer"
VOCAB_SIZE = 2304
SIZES = {
    "hidden_size": 48,
    "intermediate_size": 96,
    "num_hidden_layers": 3,
    "num_attention_heads": 4,
    "num_key_value_heads": 2,
    "vocab_size": VOCAB_SIZE,
    "max_position_embeddings": 256,
}
SCALED = {
    "rope_type": "llama3",
    "rope_theta": 20000.0,
    "factor": 4.0,
    "low_freq_factor": 1.0,
    "high_freq_factor": 4.0,
    "original_max_position_embeddings": 64,
}
MODELS: dict[str, dict[str, Any]] = {
    "llama": {},
    "tied, scaled llama": {"tie_word_embeddings": True, "rope_parameters": SCALED},
    "mistral": {"sliding_window": 32},
    "qwen3": {"head_dim": 24, "tie_word_embeddings": True},
}
TOKENS = torch.randint(VOCAB_SIZE, (2, 100), generator=torch.Generator().manual_seed(1))
ARGS = {"dim": 32, "n_layers": 4, "n_heads": 4, "n_kv_heads": 2, "ffn_dim": 64}
CONFIG = {
    "model": {"args": {**ARGS, "vocab_size": VOCAB_SIZE}, "tokenizer_path": str(TOKENIZER)},
    "training": {"dataset": "stdlib", "seq_len": 64, "steps": 9, "global_batch_size": 8},
}


def save_in_transformers(folder: Path, kind: str, scale: float = 0.2) -> torch.nn.Module:
    torch.manual_seed(0)
    name = kind.split()[-1]
    config = AutoConfig.for_model(name, **SIZES, **MODELS[kind], initializer_range=scale)
    model = AutoModelForCausalLM.from_config(config)
    for parameter in model.parameters():
        if parameter.dim() == 1:  # norms that are all 1 hide a mistake
            torch.nn.init.normal_(parameter, 1, 0.2)
    model.save_pretrained(folder)
    return model


def save_step(world: DistributedContext, folder: str, degrees: Mapping[str, int]) -> None:
    """A step as a run on a mesh saves it; initial weights are the same on every mesh."""
    config = JobConfig.model_validate({**CONFIG, "parallelism": degrees})
    dims = ParallelDims.from_section(config.parallelism, world.world_size)
    mesh = dims.build_mesh("cpu")
    model = model_builder.build_model(config, VOCAB_SIZE, mesh, dims, world.device)
    kept = json.loads(json.dumps(config.model_dump(exclude_none=True)))
    info = {"run_id": str(degrees), "config": kept, "mesh": degrees}
    store = CheckpointStore(Checkpoint(), Path(folder), world, info)
    state = {"step": 9, "num_tokens_seen": 4608}
    store.save(9, model_tensors(model.parts), state, model_only=True, blocking=True)


@pytest.fixture(scope="module")
def step(gloo_pool: GlooPool, tmp_path_factory: pytest.TempPathFactory) -> Path:
    """A step that one process has written."""
    folder = tmp_path_factory.mktemp("alone") / "checkpoint"
    gloo_pool.run(1, save_step, str(folder), {})
    return folder / "step-9"


def error_of(capsys: pytest.CaptureFixture[str], *words: object) -> str:
    assert main([str(word) for word in words]) != 0
    return capsys.readouterr().err


@pytest.mark.parametrize("kind", MODELS)
def test_transformers_computes_the_same(
    tmp_path: Path, kind: str, capsys: pytest.CaptureFixture[str]
) -> None:
    model = save_in_transformers(tmp_path / "in", kind)
    assert main(["export", str(tmp_path / "in"), str(tmp_path / "out")]) == 0
    assert "out has no tokenizer files (tokenizer: none is known)" in capsys.readouterr().err
    again = AutoModelForCausalLM.from_pretrained(tmp_path / "out")
    assert type(again) is type(model)
    with torch.no_grad():
        assert torch.equal(again(TOKENS).logits, model(TOKENS).logits)


def test_a_step_of_a_mesh_is_exported_as_that_of_one_process(
    gloo_pool: GlooPool, tmp_path: Path, step: Path
) -> None:
    degrees = {"pipeline_parallel_degree": 2, "tensor_parallel_degree": 2}
    gloo_pool.run(4, save_step, str(tmp_path / "mesh"), degrees)
    mesh = tmp_path / "mesh" / "step-9"
    assert len(list(mesh.glob("*.distcp"))) == 4
    for name, source in {"a": step, "b": mesh}.items():
        words = ["export", str(source), str(tmp_path / name), "--max-shard-size=200KB"]
        assert main(words) == 0
    contents = [
        {file.name: file.read_bytes() for file in (tmp_path / name).iterdir()} for name in "ab"
    ]
    assert contents[0] == contents[1]
    shards = sorted(name for name in contents[0] if name.endswith(".safetensors"))
    assert len(shards) > 2 and shards[0].startswith("model-00001-of-")
    index = json.loads(contents[0]["model.safetensors.index.json"])
    assert index["metadata"]["total_size"] == sum(
        tensor.nbytes for name in shards for tensor in load_file(tmp_path / "a" / name).values()
    )


def test_the_folder_is_complete(
    tmp_path: Path, step: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    out = tmp_path / "out"
    assert main(["export", str(step.parent), str(out), "--dtype", "bfloat16"]) == 0
    assert "no tokenizer files" not in capsys.readouterr().err
    model = AutoModelForCausalLM.from_pretrained(out)
    assert model.dtype == torch.bfloat16
    tokenizer = AutoTokenizer.from_pretrained(out)
    assert tokenizer.decode(tokenizer("A text.", add_special_tokens=False).input_ids) == "A text."
    end = tokenizer.convert_tokens_to_ids("<|end_of_text|>")
    assert GenerationConfig.from_pretrained(out).eos_token_id == model.config.eos_token_id == end
    card = (out / "README.md").read_text()
    assert "- Steps: 9\n- Tokens: 4,608\n- Data: stdlib" in card and "global_batch_size = 8" in card
    assert str(TOKENIZER) not in card and "parallel" not in card
    assert [path.name for path in tmp_path.iterdir()] == ["out"]


def test_the_card_names_a_start_from_the_hub() -> None:
    cached = "/home/me/.cache/huggingface/hub/models--own--small-1B/snapshots/1ce1"
    config = {"checkpoint": {"initial_load_path": cached}}
    start = "- Started from: hf://own/small-1B@1ce1"
    assert start in model_card._training({"step": 1}, config)


def test_float16_has_a_range(tmp_path: Path, capsys: pytest.CaptureFixture[str]) -> None:
    model = save_in_transformers(tmp_path / "in", "llama")
    words = ("export", tmp_path / "in", tmp_path / "out", "--dtype=float16")
    with torch.no_grad():
        model.model.layers[1].mlp.up_proj.weight[3, 4] = 70000.0  # type: ignore[index, union-attr]
    model.save_pretrained(tmp_path / "in")
    text = error_of(capsys, *words)
    assert "layers.1.feed_forward.w3.weight has a value of 70000, which is too large" in text
    assert [path.name for path in tmp_path.iterdir()] == ["in"]


def test_a_damaged_step_is_named(
    gloo_pool: GlooPool, tmp_path: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    gloo_pool.run(1, save_step, str(tmp_path / "run"), {})
    flip("__0_0.distcp", 0.5)(tmp_path / "run" / "step-9")
    text = error_of(capsys, "export", tmp_path / "run" / "step-9", tmp_path / "out")
    assert "step-9/__0_0.distcp: content differs from what was written" in text
    assert not (tmp_path / "out").exists()


def test_an_export_that_computes_something_else_is_refused(
    tmp_path: Path, step: Path, capsys: pytest.CaptureFixture[str], monkeypatch: pytest.MonkeyPatch
) -> None:
    right_rows, right_config = writer.to_hf, writer.to_hf_config

    def rows_as_ours(weights: Any, table: Any, args: Any) -> Any:
        (name,) = weights
        if name != "layers.2.attention.wk.weight":
            return right_rows(weights, table, args)
        return {"": weights[name]}

    def other_base(*arguments: Any, **more: Any) -> Any:
        config = right_config(*arguments, **more)
        config["rope_parameters"]["rope_theta"] = config["rope_theta"] = 12345.0
        return config

    def pairs_unknown_to_us(*arguments: Any, **more: Any) -> Any:
        return right_config(*arguments, **more) | {"attention_bias": True}

    cases = {
        "layers.2.attention.wk.weight differs in the export": ("to_hf", rows_as_ours),
        "rope_theta is 12345.0, not 500000.0": ("to_hf_config", other_base),
        "attention_bias": ("to_hf_config", pairs_unknown_to_us),
    }
    for text, (name, wrong) in cases.items():
        with monkeypatch.context() as patch:
            patch.setattr(writer, name, wrong)
            assert text in error_of(capsys, "export", step, tmp_path / "out")
        assert list(tmp_path.iterdir()) == []


def test_paths(tmp_path: Path, step: Path, capsys: pytest.CaptureFixture[str]) -> None:
    (tmp_path / "there").mkdir()
    (tmp_path / "text.txt").write_text("no model")
    cases = {
        (step, tmp_path / "there"): "exists already",
        (step, tmp_path / "no" / "out"): "a folder that does not exist",
        (tmp_path / "gone", tmp_path / "out"): "does not exist",
        (tmp_path / "there", tmp_path / "out"): "is no checkpoint",
        (tmp_path / "text.txt", tmp_path / "out"): "is no checkpoint",
        (step, tmp_path / "out", "--max-shard-size=big"): "is not a size such as 500MB",
    }
    for words, text in cases.items():
        assert text in error_of(capsys, "export", *words)
    assert list((tmp_path / "there").iterdir()) == [] and not (tmp_path / "out").exists()
