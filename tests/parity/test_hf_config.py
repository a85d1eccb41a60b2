"""Every field of `config.json` that is honoured computes what transformers computes with it."""

import json
from typing import Any

import pytest
import torch

from torchtitan.models.decoder.args import DecoderArgs
from torchtitan.models.decoder.model import Decoder, rope_rotations
from torchtitan.models.hf_weights import from_hf
from torchtitan.models.registry import get_family
from torchtitan.weights.description import effective
from torchtitan.weights.hf_config import from_hf_config, to_hf_config

transformers = pytest.importorskip("transformers")

TINY = {
    "vocab_size": 61,
    "hidden_size": 32,
    "intermediate_size": 48,
    "num_hidden_layers": 2,
    "num_attention_heads": 4,
    "num_key_value_heads": 2,
    "head_dim": 8,
    "max_position_embeddings": 64,
}
LLAMA3_ROPE = {
    "factor": 4.0,
    "low_freq_factor": 1.0,
    "high_freq_factor": 4.0,
    "original_max_position_embeddings": 16,
}
SLIDING = {"use_sliding_window": True, "sliding_window": 5}
OLD_ROPE = {"rope_theta": 500.0, "rope_scaling": {"type": "llama3", **LLAMA3_ROPE}}
NEW_ROPE = {"rope_parameters": {"rope_type": "llama3", "rope_theta": 500.0, **LLAMA3_ROPE}}
LINEAR = {"rope_theta": 500.0, "rope_scaling": {"type": "linear", "factor": 3.0}}
DYNAMIC = {
    "rope_scaling": {"rope_type": "dynamic", "factor": 4.0},
    "max_position_embeddings": 16,
}
YARN = {"rope_type": "yarn", "factor": 4.0, "original_max_position_embeddings": 16}
YARNS: list[dict[str, Any]] = [
    {},
    {"factor": 1.0},
    {"rope_theta": 30.0, "original_max_position_embeddings": 40},
    # The range of channels leaves the head.
    {"rope_theta": 30.0, "original_max_position_embeddings": 10000, "beta_fast": 500.0},
    {"truncate": False},
    {"truncate": None},
    {"beta_fast": 2.5, "beta_slow": 0.3},
    {"beta_fast": None, "beta_slow": None, "attention_factor": None},
    {"attention_factor": 1.7},
    {"mscale": 0.7},
    {"mscale_all_dim": 0.7},
    {"mscale": 0.707, "mscale_all_dim": 1.3},
    {"mscale": 0.707, "mscale_all_dim": 0},
    {"mscale": 2.0, "mscale_all_dim": 1.0, "attention_factor": 0.8},
    {"original_max_position_embeddings": 64},
]
"""Changes to `YARN`."""


def yarn(**more: Any) -> dict[str, Any]:
    """Return the keys of transformers 4 for YaRN."""
    scaling = {**YARN, **more}
    return {"rope_theta": scaling.pop("rope_theta", 500.0), "rope_scaling": scaling}


HONOURED = [
    ("llama", {}),
    ("llama", {"num_key_value_heads": 4}),
    ("llama", {"head_dim": 12}),
    ("llama", {"tie_word_embeddings": True}),
    ("llama", {"rms_norm_eps": 0.3}),
    ("llama", {"hidden_act": "swish"}),
    ("llama", {"rope_theta": 30.0}),
    ("llama", OLD_ROPE),
    ("llama", NEW_ROPE),
    ("llama", LINEAR),
    *(("llama", yarn(**more)) for more in YARNS),
    ("llama", {"rope_parameters": {"rope_theta": 500.0, **YARN}}),
    ("llama", {**yarn(), "original_max_position_embeddings": 8}),  # which goes before
    ("llama", {"rope_scaling": {"type": "yarn", "factor": 2.0, "finetuned": True}}),
    ("llama", {"head_dim": 12, **yarn()}),
    ("qwen3", yarn()),
    ("qwen3", OLD_ROPE),
    ("qwen3", LINEAR),
    ("mistral", yarn()),
    ("mistral", OLD_ROPE),
    ("mistral", LINEAR),
    ("llama", {"sliding_window": 5}),  # which their Llama does not read
    ("mistral", {}),
    ("mistral", {"sliding_window": 5}),
    ("mistral", {"sliding_window": None}),
    ("qwen3", {}),
    ("qwen3", {"sliding_window": 5}),
    ("qwen3", {**SLIDING, "max_window_layers": 0}),
    ("qwen3", {**SLIDING, "max_window_layers": 2}),
    ("qwen3", {**SLIDING, "layer_types": ["sliding_attention"] * 2}),
]
CLASSES = {"llama": "Llama", "mistral": "Mistral", "qwen3": "Qwen3"}


def table(kind: str, **more: Any) -> dict[str, Any]:
    return {
        "architectures": [f"{CLASSES[kind]}ForCausalLM"],
        "model_type": kind,
        **TINY,
        **more,
    }


def their_model(config: dict[str, Any], folder: Any) -> torch.nn.Module:
    """Their model of this `config.json`, with random weights, norms included."""
    (folder / "config.json").write_text(json.dumps(config))
    loaded = transformers.AutoConfig.from_pretrained(folder)
    loaded._attn_implementation = "eager"
    model = transformers.AutoModelForCausalLM.from_config(loaded).double()
    generator = torch.Generator().manual_seed(1)
    with torch.no_grad():
        for parameter in model.parameters():
            parameter.normal_(std=0.4, generator=generator)
    return model


def our_model(config: dict[str, Any], theirs: torch.nn.Module) -> Decoder:
    description = from_hf_config(config, "config.json")
    args, family = description.resolved(), get_family(description.family)
    assert isinstance(args, DecoderArgs)
    model = family.build(args).double()
    weights = from_hf(dict(theirs.named_parameters()), family.hf_weights, args)
    model.load_state_dict(weights, strict=not args.tied_embeddings)
    return model


def largest_difference(ours: Decoder, theirs: torch.nn.Module) -> float:
    tokens = torch.randint(TINY["vocab_size"], (2, 24), generator=torch.Generator().manual_seed(2))
    with torch.no_grad():
        reference = theirs(tokens).logits
        logits = ours.head(ours(tokens, torch.arange(24).expand(2, -1)))
    return float((logits - reference).abs().max() / reference.abs().max())


@pytest.mark.parametrize(("kind", "fields"), HONOURED, ids=str)
def test_honoured_fields(kind, fields, tmp_path):
    config = table(kind, **fields)
    theirs = their_model(config, tmp_path)
    ours = our_model(config, theirs)
    assert largest_difference(ours, theirs) < 2e-6  # their norms and rotations are float32
    # As transformers itself writes the config, in the style of its release.
    theirs.config.save_pretrained(tmp_path)
    written = json.loads((tmp_path / "config.json").read_text())
    again = from_hf_config({**written, "architectures": config["architectures"]}, "")
    assert effective(again.resolved()) == effective(ours.args)


@pytest.mark.parametrize("fields", [OLD_ROPE, *(yarn(**more) for more in YARNS)], ids=str)
@pytest.mark.parametrize("sizes", [{"head_dim": 8}, {"head_dim": 64, "rope_theta": 1e6}], ids=str)
def test_cosines_and_sines(fields, sizes, tmp_path):
    config = table("llama", **{**fields, **sizes})
    theirs = their_model(config, tmp_path).model.rotary_emb.float()
    args = from_hf_config(config, "config.json").resolved()
    assert isinstance(args, DecoderArgs)
    positions = torch.arange(64).unsqueeze(0)
    cosines, sines = theirs(torch.zeros(1), positions)  # [B, T, hd]: both halves alike
    for dtype in (torch.float32, torch.float64):
        ours = rope_rotations(positions, args, dtype)[:, :, 0]
        halves = torch.view_as_real(ours).unbind(-1)
        for half, reference in zip(halves, (cosines, sines), strict=True):
            expected = reference.chunk(2, -1)[0].to(dtype)
            torch.testing.assert_close(half, expected, rtol=0, atol=1e-5)


@pytest.mark.parametrize(("kind", "fields"), HONOURED, ids=str)
def test_the_config_that_we_write(kind, fields, tmp_path):
    description = from_hf_config(table(kind, **fields), "config.json")
    args, family = description.resolved(), get_family(description.family)
    assert isinstance(args, DecoderArgs)
    config = to_hf_config(family, args, bos_token_id=1)
    theirs = their_model(config, tmp_path)
    assert largest_difference(our_model(config, theirs), theirs) < 2e-6
    assert effective(from_hf_config(config, "").resolved()) == effective(args)
    old = {key: value for key, value in config.items() if key not in ("rope_parameters", "dtype")}
    assert effective(from_hf_config(old, "").resolved()) == effective(args)


@pytest.mark.parametrize("kind", CLASSES)
@pytest.mark.parametrize("key", [*TINY, "rms_norm_eps", "tie_word_embeddings", "rope_theta"])
def test_a_missing_key_has_their_default(kind, key):
    sizes = {"hidden_size": 256, "num_attention_heads": 32}  # 32 and 8 heads are defaults
    config = {k: v for k, v in table(kind, **sizes).items() if k != key}
    theirs = transformers.AutoConfig.for_model(**config).to_dict()
    written = {**theirs, "architectures": config["architectures"]}
    found = from_hf_config(config, "").resolved()
    assert effective(found) == effective(from_hf_config(written, "").resolved())
    assert found.max_seq_len == theirs["max_position_embeddings"]


@pytest.mark.parametrize(
    ("kind", "fields", "effect"),
    [
        ("llama", {"attention_bias": True}, "attention_bias"),
        ("llama", {"mlp_bias": True}, "mlp_bias"),
        ("llama", {"hidden_act": "gelu"}, "hidden_act"),
        ("llama", DYNAMIC, "dynamic"),
        ("llama", yarn(factor=1.0, attention_factor=2.0), "attention_factor = 2.0"),
        ("mistral", {"hidden_act": "relu"}, "hidden_act"),
        ("qwen3", {**SLIDING, "max_window_layers": 1}, "max_window_layers"),
        ("qwen3", {"attention_bias": True}, "attention_bias"),
    ],
)
def test_refused_fields_change_their_logits(kind, fields, effect, tmp_path):
    """Each rejected key matters: without it their model computes something else."""
    plain = their_model(table(kind), tmp_path)
    theirs = their_model(table(kind, **fields), tmp_path)
    theirs.load_state_dict(plain.state_dict(), strict=False)
    assert largest_difference(our_model(table(kind), plain), plain) < 2e-6
    assert largest_difference(our_model(table(kind), plain), theirs) > 1e-4
    with pytest.raises(ValueError, match=effect):
        from_hf_config(table(kind, **fields), "config.json")
