"""Hyper-parameters in Meta's, GGUF's and our own files. No torch."""

import json
import math
from pathlib import Path

import numpy as np
import pytest

from torchtitan.config.errors import ConfigError
from torchtitan.models.registry import get_family
from torchtitan.models.spec import ModelArgs
from torchtitan.weights.description import describe_model, differences
from torchtitan.weights.meta_params import from_meta_params, to_meta_params

LLAMA2_7B = {
    "dim": 4096,
    "multiple_of": 256,
    "n_heads": 32,
    "n_layers": 32,
    "norm_eps": 1e-05,
    "vocab_size": -1,
}
LLAMA3_70B = {
    "dim": 8192,
    "ffn_dim_multiplier": 1.3,
    "multiple_of": 4096,
    "n_heads": 64,
    "n_kv_heads": 8,
    "n_layers": 80,
    "norm_eps": 1e-05,
    "vocab_size": 128256,
    "rope_theta": 500000.0,
    "use_scaled_rope": True,
}
LLAMA32_1B = LLAMA3_70B | {
    "dim": 2048,
    "ffn_dim_multiplier": 1.5,
    "multiple_of": 256,
    "n_heads": 32,
    "n_layers": 16,
}


@pytest.mark.parametrize(
    ("params", "family", "flavor"),
    [(LLAMA2_7B, "llama2", "7B"), (LLAMA3_70B, "llama3", "70B"), (LLAMA32_1B, "llama3", "1B")],
)
def test_meta_s_files_are_the_flavors(params, family, flavor):
    found = from_meta_params(params, "params.json").resolved()
    vocab_size = 32000 if params["vocab_size"] == -1 else params["vocab_size"]
    found = found.model_copy(update={"vocab_size": vocab_size})
    assert differences(get_family(family).resolve_args(flavor, {}), found) == {}


def test_how_far_rope_is_stretched_follows_from_the_sizes():
    """Meta's files say that it is, but not how far: 8 in Llama 3.1, 32 in Llama 3.2."""
    extended = from_meta_params(LLAMA32_1B | {"vocab_size": 128264}, "params.json")
    assert extended.args["rope_scaling_factor"] == 32
    assert extended.notices == ("params.json: use_scaled_rope is a rope_scaling_factor of 32.",)
    pruned = from_meta_params(LLAMA32_1B | {"n_layers": 12}, "params.json")
    assert pruned.args["rope_scaling_factor"] == 8
    assert "set model.args.rope_scaling_factor to 32" in pruned.notices[0]


@pytest.mark.parametrize("name", ["llama2", "llama3"])
def test_every_flavor_to_meta_and_back(name):
    for flavor, args in get_family(name).flavors.items():
        found = from_meta_params(to_meta_params(args), "").resolved()
        found = found.model_copy(update={"tied_embeddings": args.tied_embeddings})
        assert differences(args, found) == {}, flavor


@pytest.mark.parametrize("key", ["moe_args", "quantization_args", "vision_chunk_size", "lora_args"])
def test_meta_s_other_models_are_refused(key):
    with pytest.raises(ConfigError, match=rf"params.json: {key} = 1: is not supported"):
        from_meta_params({**LLAMA2_7B, key: 1}, "params.json")


def test_what_meta_s_code_cannot_say():
    scaled = ({"rope_scaling_type": "linear"}, {"rope_scaling_type": "yarn"})
    for change in ({"sliding_window": 8}, *scaled, {"ffn_dim": 1001}):
        args = get_family("llama3").resolve_args("1B", change)
        with pytest.raises(ValueError, match=r"Meta|odd"):
            to_meta_params(args)


def test_only_settings_of_its_own_scaling_make_a_model_another():
    def scaled(**more: object) -> ModelArgs:
        yarn = {"rope_scaling_type": "yarn", "rope_scaling_factor": 4.0}
        return get_family("llama3").resolve_args("SmolLM2-135M", {**yarn, **more})

    same = {"rope_attention_factor": 0.1 * math.log(4) + 1, "rope_low_freq_factor": 2.0}
    assert differences(scaled(), scaled(**same)) == {}
    changed = {"rope_beta_fast": 16.0, "rope_truncate": False, "rope_original_max_seq_len": 4096}
    found = differences(scaled(), scaled(**changed))
    assert {name: theirs for name, (_, theirs) in found.items()} == changed
    sharper = differences(scaled(), scaled(rope_attention_factor=1.5))
    assert sharper["rope_attention_factor"] == (0.1 * math.log(4) + 1, 1.5)
    assert differences(scaled(rope_scaling_factor=1.0), scaled(rope_scaling_type="linear")) != {}
    assert differences(scaled(rope_scaling_factor=1.0), scaled(**same, rope_scaling_factor=1)) == {}


def gguf_file(folder: Path, tensors: dict[str, np.ndarray] | None = None, **more: object) -> Path:
    gguf = pytest.importorskip("gguf")
    path = folder / "model.gguf"
    architecture = str(more.pop("architecture", "llama"))
    writer = gguf.GGUFWriter(path, architecture)
    writer.add_embedding_length(64)
    writer.add_block_count(2)
    writer.add_head_count(4)
    writer.add_head_count_kv(2)
    writer.add_feed_forward_length(128)
    writer.add_context_length(512)
    writer.add_layer_norm_rms_eps(1e-5)
    writer.add_rope_freq_base(10000.0)
    for name, value in more.items():
        kind = "float32" if isinstance(value, float) else type(value).__name__
        add = {"str": writer.add_string, "float32": writer.add_float32, "int": writer.add_uint32}
        add[kind](f"llama.{name.replace('__', '.')}", value)
    rows = {"token_embd.weight": np.zeros((100, 64), np.float32)}
    for name, tensor in (rows | (tensors or {})).items():
        writer.add_tensor(name, tensor)
    writer.write_header_to_file()
    writer.write_kv_data_to_file()
    writer.write_tensors_to_file()
    writer.close()
    return path


def test_a_gguf_file(tmp_path):
    args = describe_model(gguf_file(tmp_path)).args
    expected = {
        "vocab_size": 100,
        "dim": 64,
        "n_layers": 2,
        "n_heads": 4,
        "n_kv_heads": 2,
        "ffn_dim": 128,
        "max_seq_len": 512,
        "norm_eps": 1e-5,
        "rope_theta": 10000.0,
        "tied_embeddings": True,
        "rope_scaling_factor": 1.0,
    }
    assert {name: args[name] for name in expected} == expected


def test_gguf_scalings(tmp_path):
    linear = gguf_file(tmp_path, rope__scaling__type="linear", rope__scaling__factor=4.0)
    args = describe_model(linear).args
    assert (args["rope_scaling_type"], args["rope_scaling_factor"]) == ("linear", 4.0)
    yarn = {"rope__scaling__type": "yarn", "rope__scaling__factor": 4.0}
    args = describe_model(gguf_file(tmp_path, **yarn)).args
    assert (args["rope_scaling_type"], args["rope_scaling_factor"]) == ("yarn", 4.0)
    assert args["rope_original_max_seq_len"] == 512  # the context of the file
    assert "rope_attention_factor" not in args
    yarn |= {"rope__scaling__original_context_length": 128, "rope__scaling__attn_factor": 0.5}
    args = describe_model(gguf_file(tmp_path, **yarn)).args
    assert args["rope_original_max_seq_len"] == 128
    assert args["rope_attention_factor"] == pytest.approx(0.5 * (0.1 * math.log(4) + 1))
    llama = get_family("llama3").resolve_args("8B", {"rope_theta": 10000.0})
    import torch

    frequencies = 10000.0 ** (-torch.arange(8) / 8)
    factors = (frequencies / llama.scale_rope(frequencies)).numpy()
    args = describe_model(gguf_file(tmp_path, {"rope_freqs.weight": factors})).args
    assert (args["rope_scaling_type"], args["rope_scaling_factor"]) == ("llama3", 8.0)
    with pytest.raises(ConfigError, match=r"rope_freqs.weight.*is not the RoPE scaling"):
        describe_model(gguf_file(tmp_path, {"rope_freqs.weight": factors[::-1].copy()}))


@pytest.mark.parametrize(
    ("more", "key"),
    [
        ({"architecture": "qwen2"}, "general.architecture"),
        ({"expert_count": 8}, "expert_count"),
        ({"rope__scaling__type": "longrope"}, "rope.scaling.type"),
        ({"rope__scaling__type": "yarn", "rope__scaling__yarn_beta_fast": 8.0}, "yarn_beta_fast"),
        ({"rope__dimension_count": 8}, "rope.dimension_count"),
        ({"attention__clamp_kqv": 1.0}, "attention.clamp_kqv"),
    ],
)
def test_what_a_gguf_file_may_not_say(more, key, tmp_path):
    with pytest.raises(ConfigError, match=key):
        describe_model(gguf_file(tmp_path, **more))


def test_files_that_are_damaged(tmp_path):
    (tmp_path / "config.json").write_text("{")
    with pytest.raises(ConfigError, match="cannot be read"):
        describe_model(tmp_path)
    (tmp_path / "config.json").write_text("[]")
    with pytest.raises(ConfigError, match="is not a JSON object"):
        describe_model(tmp_path)
    with pytest.raises(ConfigError, match="does not exist"):
        describe_model(tmp_path / "nothing")
    (tmp_path / "model.gguf").write_bytes(b"GGUF\3")
    with pytest.raises(ConfigError, match=r"not a readable GGUF file|needs the package gguf"):
        describe_model(tmp_path / "model.gguf")


def test_a_step_of_ours(tmp_path):
    model = {"name": "qwen3", "flavor": "debugmodel", "args": {"n_layers": 3, "vocab_size": 264}}
    manifest = {"info": {"config": {"model": model}}}
    (tmp_path / "manifest.json").write_text(json.dumps(manifest))
    found = describe_model(tmp_path)
    ours = get_family("qwen3").resolve_args("debugmodel", model["args"])
    assert (found.family, differences(ours, found.resolved())) == ("qwen3", {})
    (tmp_path / "manifest.json").write_text("{}")
    with pytest.raises(ConfigError, match="holds no hyper-parameters"):
        describe_model(tmp_path)
