"""Llama 3: the decoder's hyper-parameters, sizes and Hugging Face names. No torch.

The model is `decoder/model.py`; what only Llama has is here: the rule for the feed-forward's width.
"""

from __future__ import annotations

from typing import Any

from torchtitan.config.schema import PositiveFloat
from torchtitan.models.decoder.args import DecoderArgs, Width, build_decoder
from torchtitan.models.family import ModelFamily
from torchtitan.models.spec import HFWeight


class LlamaArgs(DecoderArgs):
    """Hyper-parameters of Llama 2 and 3."""

    ffn_dim: Width | None = None
    """Hidden width of the feed-forward. Unset: Llama's rule, 8/3 of `dim` times
    `ffn_dim_multiplier`, rounded up to a multiple of `multiple_of`."""

    ffn_dim_multiplier: PositiveFloat = 1.0
    """Factor in Llama's rule for the width of the feed-forward."""

    multiple_of: Width = 256
    """The width of the feed-forward by Llama's rule is a multiple of this."""

    rope_theta: PositiveFloat = 500000.0
    """Base of the rotary position embedding's wavelengths."""

    @property
    def ffn_hidden_dim(self) -> int:
        """Hidden width of the feed-forward, resolved."""
        if self.ffn_dim is not None:
            return self.ffn_dim
        wanted = int(self.ffn_dim_multiplier * (8 * self.dim // 3))
        return -(-wanted // self.multiple_of) * self.multiple_of


def _sized(dim: int, n_layers: int, n_heads: int, **more: Any) -> LlamaArgs:
    sizes = {"dim": dim, "n_layers": n_layers, "n_heads": n_heads, "n_kv_heads": 8}
    return LlamaArgs(**{"vocab_size": 128256, "rope_scaling_factor": 8.0, **sizes, **more})


def _smol(
    dim: int, n_layers: int, n_heads: int, n_kv_heads: int, ffn_dim: int, **more: Any
) -> LlamaArgs:
    sizes = {"dim": dim, "n_layers": n_layers, "n_heads": n_heads, "n_kv_heads": n_kv_heads}
    common = {"vocab_size": 49152, "max_seq_len": 8192, "tied_embeddings": True}
    return LlamaArgs(**{**sizes, **common, "ffn_dim": ffn_dim, "rope_theta": 100000.0, **more})


_SMALL: dict[str, Any] = {"rope_scaling_factor": 32.0, "tied_embeddings": True}

# 8B, 70B and 405B are Llama 3.1, 1B and 3B are Llama 3.2, SmolLM2 is Llama in other sizes
# (https://arxiv.org/abs/2502.02737). `debugmodel` runs on a CPU. It has
# TorchTitan's width and depth, but 8 heads of 32 channels in place of 16 of 16, because the softmax
# takes most of a CPU step and costs in proportion to the heads.
FLAVORS: dict[str, LlamaArgs] = {
    "debugmodel": LlamaArgs(dim=256, n_layers=6, n_heads=8, n_kv_heads=4),
    "1B": _sized(2048, 16, 32, ffn_dim_multiplier=1.5, **_SMALL),
    "3B": _sized(3072, 28, 24, **_SMALL),
    "8B": _sized(4096, 32, 32, ffn_dim_multiplier=1.3, multiple_of=1024),
    "70B": _sized(8192, 80, 64, ffn_dim_multiplier=1.3, multiple_of=4096),
    "405B": _sized(16384, 126, 128, ffn_dim_multiplier=1.2, multiple_of=4096),
    "SmolLM2-135M": _smol(576, 30, 9, 3, 1536),
    "SmolLM2-360M": _smol(960, 32, 15, 5, 2560),
    "SmolLM2-1.7B": _smol(2048, 24, 32, 32, 8192, rope_theta=130000.0),
}

_OURS, _THEIRS = "layers.{n}", "model.layers.{n}"
HF_WEIGHTS = (
    HFWeight("tok_embeddings.weight", "model.embed_tokens.weight"),
    HFWeight(f"{_OURS}.attention_norm.weight", f"{_THEIRS}.input_layernorm.weight"),
    HFWeight(f"{_OURS}.attention.wq.weight", f"{_THEIRS}.self_attn.q_proj.weight", rope=True),
    HFWeight(f"{_OURS}.attention.wk.weight", f"{_THEIRS}.self_attn.k_proj.weight", rope=True),
    HFWeight(f"{_OURS}.attention.wv.weight", f"{_THEIRS}.self_attn.v_proj.weight"),
    HFWeight(f"{_OURS}.attention.wo.weight", f"{_THEIRS}.self_attn.o_proj.weight"),
    HFWeight(f"{_OURS}.ffn_norm.weight", f"{_THEIRS}.post_attention_layernorm.weight"),
    HFWeight(f"{_OURS}.feed_forward.w1.weight", f"{_THEIRS}.mlp.gate_proj.weight"),
    HFWeight(f"{_OURS}.feed_forward.w2.weight", f"{_THEIRS}.mlp.down_proj.weight"),
    HFWeight(f"{_OURS}.feed_forward.w3.weight", f"{_THEIRS}.mlp.up_proj.weight"),
    HFWeight("norm.weight", "model.norm.weight"),
    HFWeight("output.weight", "lm_head.weight", tied=True),
)
"""Names in `LlamaForCausalLM`, and in `OlmoForCausalLM`, whose norms have no weights."""

HF_ARCHITECTURES = ("LlamaForCausalLM", "MistralForCausalLM")
"""Mistral is Llama with a sliding window."""

FAMILY = ModelFamily("llama3", LlamaArgs, FLAVORS, build_decoder, HF_WEIGHTS, HF_ARCHITECTURES)
