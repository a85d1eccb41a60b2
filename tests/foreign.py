"""Write tiny models as other programs do: Hugging Face folders, Meta's parts, GGUF files."""

import json
from collections.abc import Mapping
from pathlib import Path
from typing import Any

import numpy as np
import torch
from safetensors.torch import save_file
from torch import Tensor

from torchtitan.models.decoder.args import DecoderArgs
from torchtitan.models.hf_weights import to_hf
from torchtitan.models.registry import get_family
from torchtitan.weights.hf_config import to_hf_config

INDEX = "model.safetensors.index.json"
VOCAB_SIZE = 131


def args_of(family: str = "llama3", **more: Any) -> DecoderArgs:
    """Hyper-parameters of a model in which little divides anything: 9 heads of 6 channels."""
    sizes = {"dim": 32, "n_layers": 2, "n_heads": 9, "n_kv_heads": 3, "head_dim": 6, "ffn_dim": 90}
    sizes |= {"vocab_size": VOCAB_SIZE, **more}
    args = get_family(family).resolve_args("debugmodel", sizes)
    assert isinstance(args, DecoderArgs)
    return args


def random_weights(args: DecoderArgs, family: str = "llama3") -> dict[str, Tensor]:
    """Every parameter by our name, tied ones once; norms are random, too."""
    generator = torch.Generator().manual_seed(5)
    with torch.device("meta"):
        model = get_family(family).build(args)
    return {
        name: torch.randn(parameter.shape, generator=generator)
        for name, parameter in model.named_parameters()
    }


def write_hf(
    folder: Path,
    weights: Mapping[str, Tensor],
    args: DecoderArgs,
    family: str = "llama3",
    num_shards: int = 1,
) -> None:
    """A Hugging Face folder; tensors are dealt to the shards in turn."""
    folder.mkdir(parents=True, exist_ok=True)
    theirs = to_hf(weights, get_family(family).hf_weights, args)
    config = to_hf_config(get_family(family), args)
    (folder / "config.json").write_text(json.dumps(config))
    if num_shards == 1:
        save_file(theirs, folder / "model.safetensors")
        return
    weight_map = {}
    for number in range(num_shards):
        name = f"model-{number + 1:05}-of-{num_shards:05}.safetensors"
        shard = {key: theirs[key] for key in list(theirs)[number::num_shards]}
        save_file(shard, folder / name)
        weight_map |= dict.fromkeys(shard, name)
    write_index(folder, weight_map)


def write_index(folder: Path, weight_map: Mapping[str, str]) -> None:
    (folder / INDEX).write_text(json.dumps({"metadata": {}, "weight_map": weight_map}))


def write_meta(
    folder: Path, weights: Mapping[str, Tensor], parts: int = 1, embedding_dim: int = 0
) -> None:
    """Meta's files; `embedding_dim` is 1 in Llama 2 and 0 in Llama 3."""
    folder.mkdir(parents=True, exist_ok=True)
    (folder / "params.json").write_text("{}")
    for part in range(parts):
        held = {"rope.freqs": torch.zeros(3)}
        for name, weight in weights.items():
            columns = name.endswith(("wo.weight", "w2.weight"))
            dim = embedding_dim if name.startswith("tok_embeddings") else int(columns)
            piece = weight if weight.dim() == 1 else weight.chunk(parts, dim)[part]
            held[name] = piece.clone()
        torch.save(held, folder / f"consolidated.{part:02}.pth")


GGUF_NAMES = {
    "tok_embeddings": "token_embd",
    "norm": "output_norm",
    "output": "output",
    "attention_norm": "attn_norm",
    "attention.wq": "attn_q",
    "attention.wk": "attn_k",
    "attention.wv": "attn_v",
    "attention.wo": "attn_output",
    "ffn_norm": "ffn_norm",
    "feed_forward.w1": "ffn_gate",
    "feed_forward.w2": "ffn_down",
    "feed_forward.w3": "ffn_up",
}


def write_gguf(
    file: Path,
    weights: Mapping[str, Tensor],
    quantised: str = "F32",
    architecture: str = "llama",
    args: DecoderArgs | None = None,
) -> dict[str, Tensor]:
    """A GGUF file with matrices in a type of GGML's; returns what they hold.

    With `args` it has the hyper-parameters, too.
    """
    import gguf

    kind = gguf.GGMLQuantizationType[quantised]
    writer = gguf.GGUFWriter(file, architecture)
    if args is not None:
        writer.add_embedding_length(args.dim)
        writer.add_block_count(args.n_layers)
        writer.add_head_count(args.n_heads)
        writer.add_head_count_kv(args.num_kv_heads)
        writer.add_key_length(args.head_size())
        writer.add_feed_forward_length(args.ffn_hidden_dim)
        writer.add_context_length(args.max_seq_len)
        writer.add_layer_norm_rms_eps(args.norm_eps)
        writer.add_rope_freq_base(args.rope_theta)
    held = {}
    for name, weight in weights.items():
        parts = name.removesuffix(".weight").split(".")
        layer = f"blk.{parts[1]}." if parts[0] == "layers" else ""
        key = ".".join(parts[2:] if layer else parts)
        as_kind = kind if weight.dim() == 2 else gguf.GGMLQuantizationType.F32
        data = gguf.quantize(weight.numpy(), as_kind)
        writer.add_tensor(f"{layer}{GGUF_NAMES[key]}.weight", data, raw_dtype=as_kind)
        held[name] = torch.from_numpy(np.array(gguf.dequantize(data, as_kind)))
    writer.add_tensor("rope_freqs.weight", np.ones(3, dtype=np.float32))
    writer.write_header_to_file()
    writer.write_kv_data_to_file()
    writer.write_tensors_to_file()
    writer.close()
    return held
