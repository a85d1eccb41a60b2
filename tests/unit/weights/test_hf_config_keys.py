"""`config.json`: what is refused, by name, and what is only noticed. No torch."""

from typing import Any

import pytest

from torchtitan.config.errors import ConfigError
from torchtitan.models.decoder.args import DecoderArgs
from torchtitan.models.registry import get_family
from torchtitan.weights.description import differences
from torchtitan.weights.hf_config import from_hf_config, to_hf_config

LLAMA = {
    "architectures": ["LlamaForCausalLM"],
    "model_type": "llama",
    "vocab_size": 49152,
    "hidden_size": 576,
    "intermediate_size": 1536,
    "num_hidden_layers": 30,
    "num_attention_heads": 9,
    "num_key_value_heads": 3,
    "max_position_embeddings": 8192,
    "rms_norm_eps": 1e-05,
    "rope_theta": 100000,
    "tie_word_embeddings": True,
    "torch_dtype": "bfloat16",
}
QWEN = {"architectures": ["Qwen3ForCausalLM"], "model_type": "qwen3", "num_hidden_layers": 4}


def refused(config: dict[str, Any]) -> dict[str, str]:
    with pytest.raises(ConfigError) as caught:
        from_hf_config(config, "config.json")
    return {p.key.removeprefix("config.json: "): str(p) for p in caught.value.problems}


def test_smollm2_is_its_flavor():
    found = from_hf_config(LLAMA, "config.json")
    flavor = get_family("llama3").resolve_args("SmolLM2-135M", {})
    assert (found.family, found.notices) == ("llama3", ())
    assert differences(flavor, found.resolved()) == {}
    assert differences(flavor, found.resolved().model_copy(update={"norm_eps": 0.1})) == {
        "norm_eps": (1e-5, 0.1)
    }


@pytest.mark.parametrize(
    ("key", "value"),
    [
        ("hidden_act", "gelu"),
        ("attention_bias", True),
        ("mlp_bias", True),
        ("partial_rotary_factor", 0.5),
        ("embedding_multiplier", 12.0),
        ("logits_scaling", 8.0),
        ("logit_scale", 0.1),
        ("final_logit_softcapping", 30.0),
        ("num_local_experts", 8),
        ("quantization_config", {"quant_method": "gptq"}),
        ("auto_map", {"AutoModelForCausalLM": "modeling.Mine"}),
        ("layer_types", ["full_attention", "sliding_attention"]),
    ],
)
def test_a_refused_field_is_named_with_its_value(key, value):
    problems = refused({**LLAMA, key: value})
    assert problems.keys() == {key}
    shown = value if not isinstance(value, dict | list) else next(iter(value))
    assert str(shown).lower() in problems[key].lower()


@pytest.mark.parametrize("kind", ["dynamic", "longrope", "su", "mrope", "proportional"])
@pytest.mark.parametrize("name", ["type", "rope_type"])
@pytest.mark.parametrize("config", [LLAMA, QWEN], ids=["llama", "qwen3"])
def test_every_other_rope_scaling_is_refused(kind, name, config):
    problems = refused({**config, "rope_scaling": {name: kind, "factor": 2.0}})
    assert kind in problems["rope_scaling.rope_type"]
    assert "default, linear, llama3, yarn" in problems["rope_scaling.rope_type"]


def test_what_is_wrong_within_the_rope_scaling():
    scaling = {"rope_type": "llama3", "factor": 8.0, "low_freq_factor": 1.0, "mscale": 2}
    assert refused({**LLAMA, "rope_scaling": scaling}).keys() == {
        "rope_scaling.high_freq_factor",
        "rope_scaling.mscale",
    }
    both = {"rope_scaling": {"rope_type": "linear", "factor": 2.0}}
    both["rope_parameters"] = {"rope_type": "linear", "factor": 4.0, "rope_theta": 1e5}
    assert "rope_scaling.factor" in refused({**LLAMA, **both})
    turned = {"rope_parameters": {"rope_theta": 1e4, "partial_rotary_factor": 0.5}}
    assert "rope_parameters.partial_rotary_factor" in refused({**LLAMA, **turned})


@pytest.mark.parametrize(
    ("change", "key"),
    [
        ({"factor": None}, "rope_scaling.factor"),
        ({"factor": 0.5}, "factor"),
        ({"factor": "four"}, "rope_scaling.factor"),
        ({"factor": 1.0, "attention_factor": 2.0}, "rope_scaling.attention_factor"),
        ({"attention_factor": -1.0}, "attention_factor"),
        ({"mscale": [1]}, "rope_scaling.mscale"),
        ({"extrapolation_factor": 2.0}, "rope_scaling.extrapolation_factor"),
        ({"beta_slow": 64}, "beta_slow"),
        ({"original_max_position_embeddings": 2}, "original_max_position_embeddings"),
        ({"original_max_position_embeddings": 10**15}, "original_max_position_embeddings"),
        ({"rope_theta": 1.0}, "rope_theta"),
    ],
)
def test_what_is_wrong_within_yarn(change, key):
    length = {"original_max_position_embeddings": 2048}
    scaling = {"rope_type": "yarn", "factor": 4.0, **length, **change}
    assert refused({**LLAMA, "rope_scaling": scaling}).keys() == {key}


def test_everything_wrong_is_said_at_once():
    problems = refused({**LLAMA, "mlp_bias": True, "rope_scaling": {"type": "su"}, "alibi": True})
    assert problems.keys() == {"mlp_bias", "alibi", "rope_scaling.rope_type"}


@pytest.mark.parametrize(
    ("change", "key"),
    [
        ({"architectures": ["GPT2LMHeadModel"], "model_type": "gpt2"}, "architectures"),
        ({"architectures": None, "model_type": None}, "architectures"),
        ({"model_type": "mistral"}, "model_type"),
        ({"hidden_size": "wide"}, "hidden_size"),
        ({"num_key_value_heads": 2}, "num_key_value_heads"),
        ({"num_hidden_layers": 0}, "num_hidden_layers"),
        ({"rms_norm_eps": -1.0}, "rms_norm_eps"),
    ],
)
def test_what_is_no_model(change, key):
    assert refused({**LLAMA, **change}).keys() == {key}


def test_the_model_type_suffices():
    config = {key: value for key, value in LLAMA.items() if key != "architectures"}
    assert from_hf_config(config, "").args == from_hf_config(LLAMA, "").args


def test_what_has_no_effect_is_said():
    config = {**LLAMA, "attention_dropout": 0.1, "my_key": 1, "sliding_window": 4096}
    dropout, unknown = from_hf_config(config, "config.json").notices
    assert dropout == "config.json: attention_dropout = 0.1 is not applied."
    assert "my_key, sliding_window has no effect" in unknown
    assert from_hf_config(config, "").args == from_hf_config(LLAMA, "").args


@pytest.mark.parametrize(
    ("family", "change"),
    [
        ("llama3", {"norm_type": "layernorm"}),
        ("llama3", {"qkv_bias": True}),
        ("llama3", {"qk_norm": True}),
        ("qwen3", {"qk_norm": False}),
    ],
)
def test_models_without_a_class_in_transformers(family, change):
    args = get_family(family).resolve_args("debugmodel", change, 264)
    assert isinstance(args, DecoderArgs)
    with pytest.raises(ValueError, match=next(iter(change))):
        to_hf_config(get_family(family), args)


@pytest.mark.parametrize("name", ["llama2", "llama3", "qwen3"])
def test_every_flavor_there_and_back(name):
    family = get_family(name)
    for flavor in family.flavors:
        args = family.resolve_args(flavor, {}, 264)
        assert isinstance(args, DecoderArgs)
        found = from_hf_config(to_hf_config(family, args), "")
        assert differences(args, found.resolved()) == {}
        assert found.args["max_seq_len"] == args.max_seq_len
