"""Metadata of a GGUF file to our hyper-parameters. No torch; needs the package `gguf`."""

import math
from collections.abc import Mapping
from functools import lru_cache
from pathlib import Path
from typing import Any

import numpy as np

from torchtitan.config.errors import ConfigError, ConfigIssue
from torchtitan.models import llama3, qwen3
from torchtitan.weights.description import ModelDescription, complete
from torchtitan.weights.recognise import UnreadableDescription

_FAMILIES = {"llama": llama3.FAMILY, "qwen3": qwen3.FAMILY}
"""Families of GGUF's architectures."""
_NAMES = {
    "embedding_length": "dim",
    "block_count": "n_layers",
    "attention.head_count": "n_heads",
    "attention.head_count_kv": "n_kv_heads",
    "attention.key_length": "head_dim",
    "feed_forward_length": "ffn_dim",
    "context_length": "max_seq_len",
    "attention.layer_norm_rms_epsilon": "norm_eps",
    "rope.freq_base": "rope_theta",
    "rope.scaling.factor": "rope_scaling_factor",
    "rope.scaling.original_context_length": "rope_original_max_seq_len",
}
"""Keys after the architecture and a dot, and our names."""
_NEEDED = ("embedding_length", "block_count", "attention.head_count", "feed_forward_length")
_READ_ELSEWHERE = (
    "vocab_size",
    "rope.dimension_count",
    "rope.scaling.type",
    "rope.scaling.finetuned",
    "rope.scaling.attn_factor",
    "attention.value_length",
)
_NEUTRAL = {
    "expert_count": 0,
    "expert_used_count": 0,
    "attention.causal": True,
    "logit_scale": 1.0,
    "rope.scaling.yarn_beta_fast": 32.0,
    "rope.scaling.yarn_beta_slow": 1.0,
}
_ROPE_TENSOR = "rope_freqs.weight"


def describe_gguf(path: Path) -> ModelDescription:
    """Return the hyper-parameters of a Llama or Qwen3 in a GGUF file.

    Raises `ConfigError` for another architecture, and naming each key that is not supported.
    """
    reader = _open(path)
    fields = {name: field for name, field in reader.fields.items() if "tokenizer." not in name}
    values = {name: _plain(field.contents()) for name, field in fields.items()}
    architecture = values.get("general.architecture")
    family = _FAMILIES.get(str(architecture))
    if family is None:
        fix = f"use a file whose architecture is {' or '.join(_FAMILIES)}"
        raise ConfigError(_issue(path, "general.architecture", "unknown", fix, architecture))
    values = {name.removeprefix(f"{architecture}."): value for name, value in values.items()}
    tensors = {tensor.name: tensor for tensor in reader.tensors}
    args: dict[str, Any] = {ours: values.get(theirs) for theirs, ours in _NAMES.items()}
    args["rope_theta"] = values.get("rope.freq_base", 10000.0)
    rows = tensors.get("token_embd.weight")
    args["vocab_size"] = values.get("vocab_size") if rows is None else int(rows.shape[-1])
    args["tied_embeddings"] = "output.weight" not in tensors
    problems = _problems(path, values)
    kind = values.get("rope.scaling.type", "none")
    if kind in ("linear", "yarn"):
        args["rope_scaling_type"] = kind
    elif kind == "none":
        args.pop("rope_scaling_factor")
    else:
        text = "is not supported, only none, linear and yarn"
        problems.append(_issue(path, "rope.scaling.type", text, "use another model", kind))
    if _ROPE_TENSOR in tensors and family is qwen3.FAMILY:
        problems.append(_issue(path, _ROPE_TENSOR, "is not supported", "use another model"))
    if problems:
        raise ConfigError(problems)
    if _ROPE_TENSOR in tensors:
        args |= _llama3_scaling(path, np.array(tensors[_ROPE_TENSOR].data), args["rope_theta"])
    if family is qwen3.FAMILY:
        args["qk_norm"] = True
    if kind == "yarn":
        args |= _yarn_scaling(values)
    names = {ours: f"{architecture}.{theirs}" for theirs, ours in _NAMES.items()}
    return complete(family, args, str(path), names=names)


def _problems(path: Path, values: Mapping[str, Any]) -> list[ConfigIssue]:
    found = [
        _issue(path, name, "is missing", "get the file again")
        for name in _NEEDED
        if name not in values
    ]
    known = {*_NAMES, *_READ_ELSEWHERE}
    for name, value in values.items():
        if name.startswith(("general.", "GGUF.", "quantize.", "split.")) or name in known:
            continue
        if name not in _NEUTRAL or _NEUTRAL[name] != value:
            found.append(_issue(path, name, "is not supported", "use another model", value))
    if found:
        return found
    size = values["embedding_length"] // values["attention.head_count"]
    size = values.get("attention.key_length", size)
    for name in ("rope.dimension_count", "attention.value_length"):
        if values.get(name, size) != size:
            text = f"is not supported, only {size}, the channels of a head"
            found.append(_issue(path, name, text, "use another model", values[name]))
    return found


def _llama3_scaling(path: Path, factors: np.ndarray, theta: float) -> dict[str, Any]:
    """Return the scaling of Llama 3.1 that gives these `factors` `[hd/2]` of the wavelengths."""
    half, factor = len(factors), float(factors.max())
    args = {"rope_scaling_factor": round(factor, 3), "rope_original_max_seq_len": 8192}
    turns = 8192 * theta ** (-np.arange(half) / half) / (2 * np.pi)
    kept = ((turns - 1.0) / (4.0 - 1.0)).clip(0, 1)
    if not np.allclose(1 / (kept + (1 - kept) / factor), factors, rtol=1e-3):
        text = "is not the RoPE scaling of Llama 3.1"
        raise ConfigError(_issue(path, _ROPE_TENSOR, text, "use another model"))
    return args if factor != 1.0 else {}


def _yarn_scaling(values: Mapping[str, Any]) -> dict[str, Any]:
    """Return what llama.cpp takes where a key is missing, and YaRN's factor of the attention."""
    args: dict[str, Any] = {}
    if "rope.scaling.original_context_length" not in values:
        args["rope_original_max_seq_len"] = values.get("context_length")
    by = values.get("rope.scaling.attn_factor", 1.0)
    if by != 1:  # of the usual one
        usual = 0.1 * math.log(max(values.get("rope.scaling.factor", 1.0), 1.0)) + 1
        args["rope_attention_factor"] = _plain(by * usual)
    return args


def gguf_reader(path: Path) -> Any:
    """Return the `GGUFReader` of a file. Raises ImportError without the package, and anything.

    The last one is kept: the package takes seconds for a vocabulary, and a start reads it often.
    """
    status = path.stat()
    return _reader(path, status.st_mtime_ns, status.st_size)


@lru_cache(maxsize=1)
def _reader(path: Path, _mtime_ns: int, _size: int) -> Any:
    from gguf import GGUFReader

    return GGUFReader(path)


def _open(path: Path) -> Any:
    try:
        return gguf_reader(path)
    except ImportError:
        fix = "pip install gguf"
        raise ConfigError(ConfigIssue(str(path), "needs the package gguf", fix)) from None
    except Exception as error:  # a damaged header raises anything
        text = f"is not a readable GGUF file: {error}"
        raise UnreadableDescription(ConfigIssue(str(path), text, "get the file again")) from error


def _plain(value: Any) -> Any:
    """Return a float32 as the shortest decimal, as it was written: 1e-05, not 9.99999975e-06."""
    return float(str(np.float32(value))) if isinstance(value, float) else value


def _issue(path: Path, key: str, text: str, fix: str, value: Any = None) -> ConfigIssue:
    """Return the issue of a field; one that is not there has no value."""
    more: dict[str, Any] = {} if value is None else {"value": value}
    return ConfigIssue(f"{path}: {key}", text, fix, **more)
