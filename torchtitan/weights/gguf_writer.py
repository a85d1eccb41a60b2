"""Write a Llama or Qwen3 as a GGUF file, as llama.cpp reads it. Needs the package `gguf`.

Vectors (norms) are float32, as llama.cpp wants them.
"""

import json
from collections.abc import Mapping
from functools import partial
from pathlib import Path
from typing import Any

import numpy as np
import torch

from torchtitan.models import qwen3
from torchtitan.models.decoder.args import DecoderArgs
from torchtitan.models.hf_weights import to_hf
from torchtitan.models.llama3 import LlamaArgs
from torchtitan.weights.gguf_source import gguf_names
from torchtitan.weights.recognise import InvalidWeights
from torchtitan.weights.stored_model import StoredModel, read_tensors, target_dtype
from torchtitan.weights.tokenizer_files import folder_of_tokenizer, read_json

_LLAMA3_SPLIT = (
    r"(?i:'s|'t|'re|'ve|'m|'ll|'d)|[^\r\n\p{L}\p{N}]?\p{L}+|\p{N}{1,3}"
    r"| ?[^\s\p{L}\p{N}]+[\r\n]*|\s*[\r\n]+|\s+(?!\S)|\s+"
)
_QWEN2_SPLIT = _LLAMA3_SPLIT.replace("{1,3}", "")
_BYTES = {"type": "ByteLevel", "use_regex": True}
_PRE_TOKENIZERS: dict[str, list[dict[str, Any]]] = {
    "gpt-2": [_BYTES],
    "smollm": [{"type": "Digits", "individual_digits": True}, _BYTES],
    "llama-bpe": [
        {"type": "Split", "pattern": {"Regex": _LLAMA3_SPLIT}},
        {"type": "ByteLevel", "use_regex": False},
    ],
    "qwen2": [
        {"type": "Split", "pattern": {"Regex": _QWEN2_SPLIT}},
        {"type": "ByteLevel", "use_regex": False},
    ],
}
"""llama.cpp's names of the ways in which a text is split before byte-pair encoding, and what of
`pre_tokenizer` in a `tokenizer.json` decides."""
_YARN = {"rope_beta_fast": 32, "rope_beta_slow": 1, "rope_truncate": True}
"""The only values that llama.cpp has: of a Llama's file it ignores others."""


def gguf_dtype(model: StoredModel, dtype: str | None, name: str) -> torch.dtype:
    """Return the type in which a tensor is written."""
    entry = model.weights.tensors[name]
    found = target_dtype(entry, dtype)
    return torch.float32 if len(entry["shape"]) == 1 or found == torch.float64 else found


def write_gguf(file: Path, model: StoredModel, dtype: str | None = None) -> None:
    """Write a new file, one tensor at a time; `dtype` None keeps the types of the weights.

    Raises `InvalidWeights` for a model or tokenizer that llama.cpp does not have, and what
    `read_tensors` raises; OSError.
    """
    architecture, args = _architecture(model), model.args
    try:
        from gguf import GGMLQuantizationType, GGUFWriter
    except ImportError as error:
        text = "writing GGUF needs the package gguf: pip install gguf"
        raise InvalidWeights(text) from error
    kinds = {
        torch.float32: GGMLQuantizationType.F32,
        torch.bfloat16: GGMLQuantizationType.BF16,
        torch.float16: GGMLQuantizationType.F16,
    }
    writer = GGUFWriter(file, architecture)
    try:
        _add_args(writer, args)
        _add_tokenizer(writer, model)
        table = model.family.hf_weights
        rows = {
            row.ours: (name, row)
            for name, row in gguf_names(table, args.n_layers, architecture).items()
        }
        names, dtype_of = list(model.weights.tensors), partial(gguf_dtype, model, dtype)
        scaling = _rope_factors(args)
        for name in names:
            target, shape = dtype_of(name), model.weights.tensors[name]["shape"]
            num_bytes = int(np.prod(shape)) * target.itemsize
            kind = kinds[target]
            theirs = rows[name][0]
            writer.add_tensor_info(theirs, shape, np.dtype("f4"), num_bytes, raw_dtype=kind)
        if scaling is not None:
            size = scaling.nbytes
            writer.add_tensor_info("rope_freqs.weight", scaling.shape, scaling.dtype, size)
        writer.write_header_to_file()
        writer.write_kv_data_to_file()
        writer.write_ti_data_to_file()
        for name, tensor in read_tensors(model.weights, names, dtype_of):
            if rows[name][1].rope:
                (tensor,) = to_hf({name: tensor}, table, args).values()
            writer.write_tensor_data(tensor.view(-1).view(torch.uint8).numpy())
        if scaling is not None:
            writer.write_tensor_data(scaling)
    finally:
        writer.close()


def _architecture(model: StoredModel) -> str:
    """Return GGUF's name of the architecture. Raises `InvalidWeights` if it has none."""
    args = model.args
    is_qwen3 = model.family is qwen3.FAMILY
    problem = None
    if not is_qwen3 and not isinstance(args, LlamaArgs):
        problem = f"the family {model.family.name}"
    elif args.sliding_window or args.qkv_bias:
        problem = "a sliding window or biases"
    elif args.qk_norm != is_qwen3:
        problem = f"qk_norm = {args.qk_norm}"
    elif args.norm_type not in ("rmsnorm", "fused_rmsnorm"):
        problem = f"norm_type = {args.norm_type}"
    elif is_qwen3 and args.rope_scaling().get("rope_scaling_type") == "llama3":
        problem = "a Qwen3 with rope_scaling_type = llama3"
    else:
        scaling = args.rope_scaling()
        for name, only in _YARN.items():
            if scaling.get(name, only) != only:
                problem = f"{name} = {scaling[name]}"
    if problem is not None:
        raise InvalidWeights(f"GGUF is written for plain Llamas and Qwen3, not for {problem}")
    return "qwen3" if is_qwen3 else "llama"


def _add_args(writer: Any, args: DecoderArgs) -> None:
    from gguf import RopeScalingType

    writer.add_vocab_size(args.vocab_size)
    writer.add_context_length(args.max_seq_len)
    writer.add_embedding_length(args.dim)
    writer.add_block_count(args.n_layers)
    writer.add_feed_forward_length(args.ffn_hidden_dim)
    writer.add_head_count(args.n_heads)
    writer.add_head_count_kv(args.num_kv_heads)
    writer.add_key_length(args.head_size())
    writer.add_value_length(args.head_size())
    writer.add_rope_dimension_count(args.head_size())
    writer.add_layer_norm_rms_eps(args.norm_eps)
    writer.add_rope_freq_base(args.rope_theta)
    scaling = args.rope_scaling()
    if scaling.get("rope_scaling_type") in ("linear", "yarn"):
        writer.add_rope_scaling_type(RopeScalingType(scaling["rope_scaling_type"]))
        writer.add_rope_scaling_factor(args.rope_scaling_factor)
    if scaling.get("rope_scaling_type") == "yarn":
        writer.add_rope_scaling_orig_ctx_len(args.rope_original_max_seq_len)
        if args.rope_attention_factor is not None:
            usual = args.model_copy(update={"rope_attention_factor": None}).attention_factor
            writer.add_rope_scaling_attn_factors(args.rope_attention_factor / usual)


def _rope_factors(args: DecoderArgs) -> np.ndarray | None:
    """Return how much Llama 3.1's scaling stretches each wavelength, `[hd/2]`; None without it."""
    if args.rope_scaling().get("rope_scaling_type") != "llama3":
        return None
    exponents = torch.arange(0, args.head_size(), 2, dtype=torch.float64) / args.head_size()
    frequencies = args.rope_theta**-exponents
    return (frequencies / args.scale_rope(frequencies)).float().numpy()


def _add_tokenizer(writer: Any, model: StoredModel) -> None:
    """Add vocabulary, merges, special tokens and chat template."""
    from gguf import SpecialVocab, TokenType

    if model.tokenizer_path is None:
        writer.add_tokenizer_model("none")
        return
    folder = folder_of_tokenizer(model.tokenizer_path)
    file = folder / "tokenizer.json"
    content = read_json(file)
    table = content.get("model") or {}
    if table.get("type") != "BPE" or table.get("byte_fallback"):
        raise InvalidWeights(f"{file}: GGUF is written with byte-level BPE tokenizers only")
    assert model.args.vocab_size is not None
    tokens = [f"[PAD{number}]" for number in range(model.args.vocab_size)]
    types = [TokenType.UNUSED] * len(tokens)
    known = {number: (text, TokenType.NORMAL) for text, number in table["vocab"].items()}
    for added in content.get("added_tokens") or ():
        kind = TokenType.CONTROL if added.get("special") else TokenType.USER_DEFINED
        known[added["id"]] = added["content"], kind
    if max(known) >= len(tokens):
        text = f"has {max(known) + 1} tokens, but the model only {len(tokens)} rows"
        raise InvalidWeights(f"{file}: {text}")
    for number, (text, kind) in known.items():
        tokens[number], types[number] = text, kind
    writer.add_tokenizer_model("gpt2")
    writer.add_tokenizer_pre(_pre_tokenizer(file, content.get("pre_tokenizer") or {}))
    writer.add_token_list(tokens)
    writer.add_token_types(types)
    SpecialVocab(folder, load_merges=True, n_vocab=len(tokens)).add_to_gguf(writer, quiet=True)


def _pre_tokenizer(file: Path, found: Mapping[str, Any]) -> str:
    """Return llama.cpp's name of a `pre_tokenizer`."""
    steps = found.get("pretokenizers", [found])
    for name, wanted in _PRE_TOKENIZERS.items():
        if len(steps) == len(wanted) and all(
            step.get(key, key == "use_regex") == value
            for step, of in zip(steps, wanted, strict=True)
            for key, value in of.items()
        ):
            return name
    text = json.dumps(found)
    raise InvalidWeights(f"{file}: llama.cpp has no pre-tokenizer that is known to equal {text}")
