"""Meta's `params.json` to our hyper-parameters and back. No torch."""

import math
from collections.abc import Mapping
from typing import Any

from torchtitan.config.errors import ConfigError, ConfigIssue
from torchtitan.models.llama3 import FAMILY, LlamaArgs
from torchtitan.weights.description import ModelDescription, complete

_NAMES = {
    "dim": "dim",
    "n_layers": "n_layers",
    "n_heads": "n_heads",
    "n_kv_heads": "n_kv_heads",
    "head_dim": "head_dim",
    "hidden_dim": "ffn_dim",
    "vocab_size": "vocab_size",
    "multiple_of": "multiple_of",
    "ffn_dim_multiplier": "ffn_dim_multiplier",
    "norm_eps": "norm_eps",
    "rope_theta": "rope_theta",
    "sliding_window": "sliding_window",
}
"""Their names and ours. Mistral's files have `head_dim`, `hidden_dim` and `sliding_window`."""
_DEFAULTS = {
    "dim": 4096,
    "n_layers": 32,
    "n_heads": 32,
    "multiple_of": 256,
    "norm_eps": 1e-5,
    "rope_theta": 10000.0,
}
"""Default of Llama 2's code. Files of Llama 3 always have `rope_theta`."""
_NO_EFFECT = ("max_seq_len", "max_batch_size", "use_scaled_rope", "model_type")
_SCALING_FACTOR = 8.0
"""Llama 3.1's, in Meta's code. Llama 3.2's files do not say that theirs is another."""


def from_meta_params(params: Mapping[str, Any], source: str) -> ModelDescription:
    """Return the hyper-parameters in a `params.json`, whose path is `source`.

    A vocabulary of -1 is the tokenizer's and left open. Raises `ConfigError` naming each key that
    this library does not support.
    """
    unknown = [key for key in params if key not in _NAMES and key not in _NO_EFFECT]
    if unknown:
        text, fix = "is not supported: it is not a key of Llama's", "use another model"
        raise ConfigError(
            [ConfigIssue(f"{source}: {key}", text, fix, params[key]) for key in unknown]
        )
    given = {key: value for key, value in params.items() if value is not None}
    found = {**_DEFAULTS, **given}
    values: dict[str, Any] = {ours: found.get(theirs) for theirs, ours in _NAMES.items()}
    if values["vocab_size"] == -1:
        values["vocab_size"] = None
    values["max_seq_len"] = 4096
    notices = []
    if values["rope_theta"] >= 500000.0:
        values["max_seq_len"] = 8192
    if params.get("use_scaled_rope"):
        known = _flavor_like(values)
        factor = _SCALING_FACTOR if known is None else known.rope_scaling_factor
        values |= {"rope_scaling_factor": factor, "max_seq_len": 131072}
        notice = f"{source}: use_scaled_rope is a rope_scaling_factor of {factor:g}"
        if known is None:
            notice += (
                ", as in Llama 3.1, because these sizes are of no known model: set"
                " model.args.rope_scaling_factor to 32 if it descends from Llama 3.2"
            )
        notices.append(f"{notice}.")
        if known is not None and known.tied_embeddings:
            values["tied_embeddings"] = True
    names = {ours: theirs for theirs, ours in _NAMES.items()}
    return complete(FAMILY, values, source, tuple(notices), names)


def _flavor_like(values: Mapping[str, Any]) -> LlamaArgs | None:
    """Return the flavor of Llama 3 that has these sizes; its vocabulary may have been extended."""
    sizes = ("dim", "n_layers", "n_heads")
    for args in FAMILY.flavors.values():
        assert isinstance(args, LlamaArgs)
        if all(getattr(args, name) == values[name] for name in sizes):
            return args
    return None


def to_meta_params(args: LlamaArgs) -> dict[str, Any]:
    """Return the `params.json` of a model.

    Raises ValueError for a model that Meta's code does not compute.
    """
    if args.sliding_window or args.qk_norm or args.qkv_bias:
        raise ValueError("Meta's code has no sliding window, normalised heads or biases")
    if args.head_size() * args.n_heads != args.dim:
        raise ValueError("Meta's code has no head_dim but dim / n_heads")
    scaled = args.rope_scaling_factor != 1.0
    if scaled and (args.rope_scaling_type, args.rope_original_max_seq_len) != ("llama3", 8192):
        raise ValueError("Meta's code has no RoPE scaling but Llama 3.1's")
    params: dict[str, Any] = {
        "dim": args.dim,
        "n_layers": args.n_layers,
        "n_heads": args.n_heads,
        "n_kv_heads": args.num_kv_heads,
        "vocab_size": -1 if args.vocab_size is None else args.vocab_size,
        "norm_eps": args.norm_eps,
        "rope_theta": args.rope_theta,
        "multiple_of": args.multiple_of,
        "ffn_dim_multiplier": args.ffn_dim_multiplier,
    }
    if args.ffn_dim is not None:  # the factor with which Llama's rule gives this width
        params["multiple_of"] = math.gcd(args.ffn_dim, 256)
        params["ffn_dim_multiplier"] = (args.ffn_dim - 0.5) / (8 * args.dim // 3)
        if params["multiple_of"] == 1:
            raise ValueError(f"Llama's rule does not give the odd width {args.ffn_dim}")
    return params | ({"use_scaled_rope": True} if scaled else {})
