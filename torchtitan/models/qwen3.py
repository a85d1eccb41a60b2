"""Qwen3, dense (https://arxiv.org/abs/2505.09388): the decoder with normalised heads. No torch."""

from typing import Any

from torchtitan.models import llama3
from torchtitan.models.decoder.args import DecoderArgs, build_decoder
from torchtitan.models.family import ModelFamily
from torchtitan.models.spec import HFWeight


def _sized(*, n_kv_heads: int = 8, head_dim: int = 128, **sizes: Any) -> DecoderArgs:
    return DecoderArgs(
        n_kv_heads=n_kv_heads,
        head_dim=head_dim,
        qk_norm=True,
        norm_eps=1e-6,
        rope_theta=1e6,
        max_seq_len=40960,
        rope_original_max_seq_len=32768,
        **sizes,
    )


_SMALL: dict[str, Any] = {"vocab_size": 151936, "tied_embeddings": True}
_LARGE: dict[str, Any] = {"vocab_size": 151936}

FLAVORS: dict[str, DecoderArgs] = {
    "debugmodel": _sized(
        dim=256, n_layers=6, n_heads=8, n_kv_heads=4, head_dim=64, ffn_dim=768, tied_embeddings=True
    ),
    "0.6B": _sized(**_SMALL, dim=1024, n_layers=28, n_heads=16, ffn_dim=3072),
    "1.7B": _sized(**_SMALL, dim=2048, n_layers=28, n_heads=16, ffn_dim=6144),
    "4B": _sized(**_SMALL, dim=2560, n_layers=36, n_heads=32, ffn_dim=9728),
    "8B": _sized(**_LARGE, dim=4096, n_layers=36, n_heads=32, ffn_dim=12288),
    "14B": _sized(**_LARGE, dim=5120, n_layers=40, n_heads=40, ffn_dim=17408),
    "32B": _sized(**_LARGE, dim=5120, n_layers=64, n_heads=64, ffn_dim=25600),
}

_OURS, _THEIRS = "layers.{n}.attention", "model.layers.{n}.self_attn"
HF_WEIGHTS = (
    *llama3.HF_WEIGHTS,
    HFWeight(f"{_OURS}.q_norm.weight", f"{_THEIRS}.q_norm.weight", rope=True),
    HFWeight(f"{_OURS}.k_norm.weight", f"{_THEIRS}.k_norm.weight", rope=True),
)

FAMILY = ModelFamily(
    "qwen3", DecoderArgs, FLAVORS, build_decoder, HF_WEIGHTS, ("Qwen3ForCausalLM",)
)
