"""Llama 2 (https://arxiv.org/abs/2307.09288): Llama 3's model in other sizes. No torch."""

from typing import Any

from torchtitan.models.decoder.args import build_decoder
from torchtitan.models.family import ModelFamily
from torchtitan.models.llama3 import HF_ARCHITECTURES, HF_WEIGHTS, LlamaArgs

_COMMON: dict[str, Any] = {
    "max_seq_len": 4096,
    "rope_theta": 10000.0,
    "rope_original_max_seq_len": 4096,
}
_SIZED: dict[str, Any] = {**_COMMON, "vocab_size": 32000}
_70B: dict[str, Any] = {"n_kv_heads": 8, "ffn_dim_multiplier": 1.3, "multiple_of": 4096}

FLAVORS: dict[str, LlamaArgs] = {
    "debugmodel": LlamaArgs(**_COMMON, dim=256, n_layers=6, n_heads=8),
    "7B": LlamaArgs(**_SIZED, dim=4096, n_layers=32, n_heads=32),
    "13B": LlamaArgs(**_SIZED, dim=5120, n_layers=40, n_heads=40),
    "70B": LlamaArgs(**_SIZED, dim=8192, n_layers=80, n_heads=64, **_70B),
}

FAMILY = ModelFamily("llama2", LlamaArgs, FLAVORS, build_decoder, HF_WEIGHTS, HF_ARCHITECTURES)
