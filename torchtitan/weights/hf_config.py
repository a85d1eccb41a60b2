"""`config.json` of Hugging Face to our hyper-parameters and back. No torch.

Files of transformers 4 (`rope_theta`, `rope_scaling`, `torch_dtype`) and 5 (`rope_parameters`,
`dtype`) are read, and both styles are written. Missing keys have the defaults of transformers, not
ours. A key that changes what the model computes is honoured or refused by name.
"""

import math
import re
from collections.abc import Iterator, Mapping
from typing import Any

from torchtitan.config.errors import ConfigError, ConfigIssue
from torchtitan.models.decoder.args import DecoderArgs
from torchtitan.models.family import ModelFamily
from torchtitan.models.registry import families
from torchtitan.weights.description import ModelDescription, complete

_NAMES = {
    "vocab_size": "vocab_size",
    "hidden_size": "dim",
    "num_hidden_layers": "n_layers",
    "num_attention_heads": "n_heads",
    "num_key_value_heads": "n_kv_heads",
    "head_dim": "head_dim",
    "intermediate_size": "ffn_dim",
    "max_position_embeddings": "max_seq_len",
    "rms_norm_eps": "norm_eps",
    "tie_word_embeddings": "tied_embeddings",
}
"""Their names and ours."""
_COMMON: dict[str, Any] = {
    "vocab_size": 32000,
    "hidden_size": 4096,
    "num_hidden_layers": 32,
    "num_attention_heads": 32,
    "num_key_value_heads": None,
    "head_dim": None,
    "hidden_act": "silu",
    "rms_norm_eps": 1e-6,
    "tie_word_embeddings": False,
}
DEFAULTS: dict[str, dict[str, Any]] = {
    "LlamaForCausalLM": {
        **_COMMON,
        "intermediate_size": 11008,
        "max_position_embeddings": 2048,
    },
    "MistralForCausalLM": {
        **_COMMON,
        "intermediate_size": 14336,
        "max_position_embeddings": 131072,
        "num_key_value_heads": 8,
        "sliding_window": 4096,
    },
    "Qwen3ForCausalLM": {
        **_COMMON,
        "vocab_size": 151936,
        "intermediate_size": 22016,
        "max_position_embeddings": 32768,
        "num_key_value_heads": 32,
        "head_dim": 128,
        "sliding_window": 4096,
        "use_sliding_window": False,
        "max_window_layers": 28,
    },
}
"""The defaults of transformers, by architecture."""
_MODEL_TYPES = {
    "llama": "LlamaForCausalLM",
    "mistral": "MistralForCausalLM",
    "qwen3": "Qwen3ForCausalLM",
}
_THETA = 10000.0
_SCALING = {
    "factor": "rope_scaling_factor",
    "original_max_position_embeddings": "rope_original_max_seq_len",
    "low_freq_factor": "rope_low_freq_factor",
    "high_freq_factor": "rope_high_freq_factor",
    "beta_fast": "rope_beta_fast",
    "beta_slow": "rope_beta_slow",
    "truncate": "rope_truncate",
    "attention_factor": "rope_attention_factor",
}
"""Their names and ours within RoPE's scaling."""
_MSCALE = ("mscale", "mscale_all_dim")
_SCALINGS: dict[str, tuple[str, ...]] = {
    "default": (),
    "linear": ("factor",),
    "llama3": tuple(_SCALING)[:4],
    "yarn": (*tuple(_SCALING)[:2], *tuple(_SCALING)[4:], *_MSCALE),
}
"""The keys that each type of scaling reads."""
_NEEDED = tuple(_SCALING)[:4]
"""Keys without which transformers does not load a type of scaling that reads them."""
_ROPE_KEYS = {"rope_type", "type", "rope_theta", "partial_rotary_factor", "finetuned", *_SCALING}

_SUPPORTED: dict[str, tuple[Any, ...]] = {
    "hidden_act": ("silu", "swish"),
    "hidden_activation": ("silu", "swish"),
    **dict.fromkeys(
        (
            "attention_bias",
            "mlp_bias",
            "qkv_bias",
            "use_bias",
            "use_qkv_bias",
            "lm_head_bias",
            "rope_interleaved",
            "parallel_attn",
            "use_parallel_residual",
            "qk_layernorm",
            "use_qk_norm",
            "alibi",
        ),
        (False,),
    ),
    **dict.fromkeys(
        (
            "partial_rotary_factor",
            "rotary_pct",
            "embedding_multiplier",
            "embedding_scale",
            "residual_multiplier",
            "logits_scaling",
            "logit_scale",
            "lm_head_multiplier",
            "scale_emb",
        ),
        (1,),
    ),
    **dict.fromkeys(
        (
            "attention_multiplier",
            "query_pre_attn_scalar",
            "attn_logit_softcapping",
            "final_logit_softcapping",
            "clip_qkv",
            "no_rope_layers",
            "attention_chunk_size",
            "num_experts",
            "num_local_experts",
            "quantization_config",
            "compression_config",
            "auto_map",
        ),
        (),
    ),
}
"""Keys of which only some values are supported: these, null and absence."""
_WHY = {
    "quantization_config": ("quantised weights are not read", "use the original model"),
    "compression_config": ("quantised weights are not read", "use the original model"),
    "auto_map": ("names code of the repository, which may compute anything", "use another model"),
}
_NO_EFFECT = re.compile(
    r"architectures|model_type|(torch_)?dtype|transformers_version|transformers\.js_config"
    r"|_?(model_)?name_or_path|use_cache|initializer_range|pretraining_tp|\w+_token_id|tokenizer_class"
    r"|_?attn_implementation\w*|use_flash_attn|rope_(theta|scaling|parameters)"
    r"|original_max_position_embeddings|(use_)?sliding_window|max_window_layers|layer_types"
    r"|attention_dropout|is_llama_config|output_(attentions|hidden_states)|return_dict\w*"
    r"|is_(encoder_)?decoder|id2label|label2id|num_labels|problem_type|task_specific_params"
    r"|chunk_size_feed_forward|torchscript|use_bfloat16|finetuning_task|prefix|pruned_heads"
    r"|cross_attention_hidden_size|add_cross_attention|tie_encoder_decoder|unsloth_\w+"
)
"""Keys that are read elsewhere in this module, or that do not change what the model computes."""


def from_hf_config(config: Mapping[str, Any], source: str) -> ModelDescription:
    """Return the hyper-parameters in a `config.json`, whose path is `source`.

    Raises `ConfigError` naming each field that this library does not support.
    """
    architecture, family = _architecture(config, source)
    given = {key: value for key, value in config.items() if value is not None or key in _NAMES}
    given |= {"sliding_window": None} if config.get("sliding_window", 0) is None else {}
    values = {**DEFAULTS.get(architecture, {}), **given}
    rope, problems = _rope_args(values, source)
    problems += _refused(values, source)
    window, more = _window(architecture, values, source)
    missing = [name for name in _NAMES if name not in values]
    problems += more + [
        _issue(source, name, f"is missing, and {architecture} has no known default", "add it")
        for name in missing
    ]
    if problems:
        raise ConfigError(problems)
    args = {ours: values[theirs] for theirs, ours in _NAMES.items()}
    args |= {**rope, "sliding_window": window}
    if "qk_norm" in family.args_type.model_fields:
        args["qk_norm"] = any(row.ours.endswith("q_norm.weight") for row in family.hf_weights)
    names = {ours: theirs for theirs, ours in (_NAMES | _SCALING).items()}
    return complete(family, args, source, tuple(_notices(config, architecture, source)), names)


def _architecture(config: Mapping[str, Any], source: str) -> tuple[str, ModelFamily]:
    """Return the class of transformers and the family that computes the same."""
    of_type = _MODEL_TYPES.get(str(config.get("model_type")))
    names = config.get("architectures") or ([of_type] if of_type else [])
    known = {name: family for family in families().values() for name in family.hf_architectures}
    first = str(names[0]) if isinstance(names, list) and names else None
    problem = None
    if first is None:
        key, problem = "architectures", "is missing, so the model is unknown"
    elif first not in known:
        key, problem = "architectures", "no family computes this"
    elif of_type is not None and of_type != first:
        key, problem = "model_type", f"contradicts architectures = {first}"
    if problem is None and first is not None:
        # Llama 2 and 3 share an architecture: the first registered family stands for it.
        family = next(f for f in families().values() if first in f.hf_architectures)
        return first, family
    fix = f"use a model that is one of {', '.join(known)}"
    raise ConfigError(_issue(source, key, problem or "", fix, config.get(key)))


def _rope_args(config: Mapping[str, Any], source: str) -> tuple[dict[str, Any], list[ConfigIssue]]:
    """Return RoPE's hyper-parameters and what of the config is not supported."""
    both = [config.get(key) or {} for key in ("rope_scaling", "rope_parameters")]
    key = "rope_scaling" if both[0] else "rope_parameters"
    scaling = both[0] or both[1]
    theta = scaling.get("rope_theta", config.get("rope_theta") or _THETA)
    kind = scaling.get("rope_type", scaling.get("type", "default"))
    args, problems = {"rope_theta": theta}, []

    def refuse(name: str, text: str, fix: str, value: Any) -> None:
        problems.append(_issue(source, f"{key}.{name}", text, fix, value))

    for name in sorted(both[0].keys() & both[1].keys()):
        if both[0][name] != both[1][name]:
            text = f"is {both[1][name]} in rope_parameters"
            problems.append(_issue(source, f"rope_scaling.{name}", text, "remove one of the two"))
    if scaling.get("partial_rotary_factor") not in (None, 1):
        text = "is not supported: all channels of a head are rotated"
        refuse("partial_rotary_factor", text, "use another model", scaling["partial_rotary_factor"])
    read = _SCALINGS.get(kind, ())
    for name in sorted(scaling.keys() - _ROPE_KEYS - {*read}):
        refuse(name, "is not supported", "use another model", scaling[name])
    if kind not in _SCALINGS:
        text = f"is not supported, only {', '.join(_SCALINGS)}"
        fix = "use another model, or remove the scaling if the model was trained without it"
        refuse("rope_type", text, fix, kind)
    length = config.get("max_position_embeddings")
    found = {"original_max_position_embeddings": length, **scaling}
    # transformers prefers the key of this name that is outside.
    found |= {k: config[k] for k in read if k.startswith("original_") and k in config}
    for name in read:
        value = found.get(name)
        if value is None and name in _NEEDED:
            refuse(name, "is missing", "add it", None)
        elif value is not None and not isinstance(value, int | float):
            refuse(name, "is not a number", "correct the file, or get it again", value)
    if read and not problems:
        args |= {"rope_scaling_type": kind}
        args |= {ours: found.get(theirs) for theirs, ours in _SCALING.items() if theirs in read}
    if kind == "yarn" and not problems:
        args["rope_truncate"] = bool(found.get("truncate", True))
        args["rope_attention_factor"] = factor = _attention_factor(found)
        if found["factor"] == 1 and factor not in (None, 1):
            text, fix = "is not supported with factor = 1", "use another model"
            refuse("attention_factor", text, fix, factor)
    return args, problems


def _attention_factor(scaling: Mapping[str, Any]) -> float | None:
    """Return YaRN's factor of queries and keys; None: the one that follows from its scaling."""
    over, under = (scaling.get(name) for name in _MSCALE)
    if scaling.get("attention_factor") is not None or not (over and under):
        return scaling.get("attention_factor")
    log = 0.1 * math.log(max(scaling["factor"], 1))
    return (over * log + 1) / (under * log + 1)


def _window(
    architecture: str, values: Mapping[str, Any], source: str
) -> tuple[int | None, list[ConfigIssue]]:
    """Return the sliding window of all layers; a window of some is not supported."""
    # LlamaForCausalLM ignores the key, and `_notices` says so.
    window = values.get("sliding_window") if architecture != "LlamaForCausalLM" else None
    if not values.get("use_sliding_window", True):
        window = None
    layers = values.get("layer_types")
    if layers is None and window is not None and "max_window_layers" in values:
        full = min(values["max_window_layers"], values["num_hidden_layers"])
        layers = ["full_attention"] * full
        layers += ["sliding_attention"] * (values["num_hidden_layers"] - full)
    kinds = set(layers or ())
    if kinds <= {"full_attention"} and layers:
        return None, []
    if not layers or (kinds == {"sliding_attention"} and window is not None):
        return window, []
    text = f"mixes {' and '.join(sorted(map(str, kinds)))}: every layer here has the same attention"
    name = "layer_types" if values.get("layer_types") else "max_window_layers"
    return None, [_issue(source, name, text, "use another model", values.get(name))]


def _refused(values: Mapping[str, Any], source: str) -> list[ConfigIssue]:
    found = []
    for key, supported in _SUPPORTED.items():
        value = values.get(key)
        if value is not None and value not in supported:
            known = " or ".join(map(repr, supported))
            text = f"is not supported, only {known}" if known else "is not supported"
            text, fix = _WHY.get(key, (text, "use another model"))
            shown = list(value) if isinstance(value, Mapping) else value
            found.append(_issue(source, key, text, fix, shown))
    return found


def _notices(config: Mapping[str, Any], architecture: str, source: str) -> Iterator[str]:
    if config.get("attention_dropout"):
        yield f"{source}: attention_dropout = {config['attention_dropout']} is not applied."
    known = {**_NAMES, **_SUPPORTED}
    unknown = [key for key in config if key not in known and not _NO_EFFECT.fullmatch(key)]
    if architecture == "LlamaForCausalLM" and config.get("sliding_window"):
        unknown.append("sliding_window")
    if unknown:
        yield f"{source}: {', '.join(unknown)} has no effect, as {architecture} does not read it."


def _issue(source: str, key: str, text: str, fix: str, value: Any = None) -> ConfigIssue:
    """Return the issue of a field; one that is not there has no value."""
    more: dict[str, Any] = {} if value is None else {"value": value}
    return ConfigIssue(f"{source}: {key}", text, fix, **more)


def to_hf_config(
    family: ModelFamily, args: DecoderArgs, dtype: str = "float32", **token_ids: int | None
) -> dict[str, Any]:
    """Return the `config.json` of a model, for any transformers from 4.43 on.

    `token_ids`: such as `bos_token_id`. Raises ValueError for a model that no class of transformers
    computes.
    """
    normed = any(row.ours.endswith("q_norm.weight") for row in family.hf_weights)
    for name, wanted in {"norm_type": "rmsnorm", "qkv_bias": False, "qk_norm": normed}.items():
        value = getattr(args, name)
        if value != wanted and value != f"fused_{wanted}":
            raise ValueError(f"{family.name} with {name} = {value} has no class in transformers")
    architecture = family.hf_architectures[0] if family.hf_architectures else None
    window = args.sliding_window
    if architecture == "LlamaForCausalLM" and window is not None:
        architecture = "MistralForCausalLM"
    if architecture not in DEFAULTS:
        raise ValueError(f"the family {family.name} names no class of transformers")
    values = {**args.model_dump(), "n_kv_heads": args.num_kv_heads, "head_dim": args.head_size()}
    values["ffn_dim"] = args.ffn_hidden_dim
    config: dict[str, Any] = {
        "architectures": [architecture],
        "model_type": next(t for t, name in _MODEL_TYPES.items() if name == architecture),
        **{theirs: values[ours] for theirs, ours in _NAMES.items()},
        "hidden_act": "silu",
        "attention_bias": False,
        "attention_dropout": 0.0,
        "mlp_bias": False,
        "use_cache": True,
        "dtype": dtype,
        "torch_dtype": dtype,
        **_rope_keys(args),
        **token_ids,
    }
    if architecture == "MistralForCausalLM":
        config["sliding_window"] = window
    elif architecture == "Qwen3ForCausalLM":
        kind = "full_attention" if window is None else "sliding_attention"
        config |= {
            "use_sliding_window": window is not None,
            "sliding_window": window,
            "max_window_layers": args.n_layers if window is None else 0,
            "layer_types": [kind] * args.n_layers,
        }
    return config


def _rope_keys(args: DecoderArgs) -> dict[str, Any]:
    """Return RoPE's keys in the styles of transformers 4 and 5."""
    theta = args.rope_theta
    found = args.rope_scaling()
    scaling: dict[str, Any] | None = None
    if found:
        scaling = {"rope_type": found["rope_scaling_type"]}
        scaling |= {k: found[ours] for k, ours in _SCALING.items() if found.get(ours) is not None}
    parameters = {"rope_theta": theta, **(scaling or {"rope_type": "default"})}
    return {"rope_theta": theta, "rope_scaling": scaling, "rope_parameters": parameters}
