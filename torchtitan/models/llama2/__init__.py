"""The Llama 2 family (https://arxiv.org/abs/2307.09288): Llama 3's model in other sizes. No torch.

Llama 2 has a vocabulary of 32,000 tokens, sequences of 4,096 and RoPE of base 10,000. All but 70B
have as many key heads as query heads; `debugmodel` is Llama 3's but for that.
"""

from typing import Any

from torchtitan.models.llama3 import FAMILY as LLAMA3
from torchtitan.models.llama3.flavors import SHAPE_70B, LlamaArgs
from torchtitan.models.spec import ModelFamily


def _sized(**sizes: Any) -> LlamaArgs:
    """Hyper-parameters of these sizes, with what all sizes have."""
    return LlamaArgs(max_seq_len=4096, rope_theta=10000.0, rope_original_max_seq_len=4096, **sizes)


_VOCAB_SIZE = 32000

FLAVORS: dict[str, LlamaArgs] = {
    "debugmodel": _sized(dim=256, n_layers=6, n_heads=8),
    "7B": _sized(vocab_size=_VOCAB_SIZE, dim=4096, n_layers=32, n_heads=32),
    "13B": _sized(vocab_size=_VOCAB_SIZE, dim=5120, n_layers=40, n_heads=40),
    "70B": _sized(vocab_size=_VOCAB_SIZE, **SHAPE_70B),
}

FAMILY = ModelFamily(name="llama2", args_type=LlamaArgs, flavors=FLAVORS, build=LLAMA3.build)
