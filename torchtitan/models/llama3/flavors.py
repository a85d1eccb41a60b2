"""Llama 3's hyper-parameters and published sizes. No torch.

8B, 70B and 405B are Llama 3.1, 1B and 3B are Llama 3.2. `debugmodel` is for trying things out on a
CPU: TorchTitan's width and depth, but 8 heads of size 32 instead of 16 of size 16, because the
softmax costs in proportion to the heads and took most of a CPU step (half the heads, half the
time); and half as many key heads as query heads, to exercise the grouped attention of the others.
"""

from collections.abc import Iterator
from typing import Annotated, Any

from pydantic import Field

from torchtitan.config.errors import ConfigIssue
from torchtitan.config.schema import NormType, PositiveFloat, PositiveInt
from torchtitan.models.spec import ModelArgs

_MOST_TENSOR_RANKS = 1024
"""Larger degrees are not proposed."""
Width = Annotated[int, Field(gt=0, le=2**24)]


class LlamaArgs(ModelArgs):
    dim: Width = 4096
    """Width of the residual stream."""

    n_layers: Annotated[int, Field(gt=0, le=10_000)] = 32
    """Transformer blocks."""

    n_heads: PositiveInt = 32
    """Query heads; must divide `dim`, giving heads of even size."""

    n_kv_heads: PositiveInt | None = None
    """Key and value heads, each shared by a group of query heads. Unset: as many as `n_heads`."""

    ffn_dim: Width | None = None
    """Hidden width of the feed-forward. Unset: Llama's rule, 8/3 of `dim` times
    `ffn_dim_multiplier`, rounded up to a multiple of `multiple_of`."""

    ffn_dim_multiplier: PositiveFloat = 1.0
    """Factor in Llama's rule for the width of the feed-forward."""

    multiple_of: Width = 256
    """The width of the feed-forward by Llama's rule is a multiple of this."""

    norm_type: NormType = "rmsnorm"
    """Kind of norm; `model.norm_type` sets it."""

    norm_eps: PositiveFloat = 1e-5
    """Added to the mean square in RMSNorm, to the variance in LayerNorm."""

    rope_theta: PositiveFloat = 500000.0
    """Base of the rotary position embedding's wavelengths."""

    rope_scaling_factor: Annotated[float, Field(ge=1)] = 1.0
    """Llama 3.1's stretching of long RoPE wavelengths for longer contexts; 1 is none."""

    rope_low_freq_factor: PositiveFloat = 1.0
    """Wavelengths above the original context length divided by this are stretched in full."""

    rope_high_freq_factor: PositiveFloat = 4.0
    """Wavelengths below the original context length divided by this are not stretched."""

    rope_original_max_seq_len: PositiveInt = 8192
    """Context length before the stretching."""

    sliding_window: PositiveInt | None = None
    """A token attends to the last so many tokens only, itself among them. Unset: to all before it.
    """

    tied_embeddings: bool = False
    """The head uses the token embedding's matrix."""

    @property
    def head_dim(self) -> int:
        """Size of a head."""
        return self.dim // self.n_heads

    @property
    def num_kv_heads(self) -> int:
        """Key and value heads, resolved."""
        return self.n_heads if self.n_kv_heads is None else self.n_kv_heads

    @property
    def ffn_hidden_dim(self) -> int:
        """Hidden width of the feed-forward, resolved."""
        if self.ffn_dim is not None:
            return self.ffn_dim
        wanted = int(self.ffn_dim_multiplier * (8 * self.dim // 3))
        return -(-wanted // self.multiple_of) * self.multiple_of

    def modules(self) -> dict[str, int]:
        """See `ModelArgs`."""
        assert self.vocab_size is not None
        kv_dim = self.num_kv_heads * self.head_dim
        attention = 2 * self.dim * (self.dim + kv_dim)
        norm = 0 if self.norm_type == "np_layernorm" else self.dim
        block = attention + 3 * self.dim * self.ffn_hidden_dim + 2 * norm
        vocabulary = self.vocab_size * self.dim
        blocks = {f"layers.{n}": block for n in range(self.n_layers)}
        return {"tok_embeddings": vocabulary, **blocks, "norm": norm, "output": vocabulary}

    def hidden_size(self) -> int:
        """See `ModelArgs`."""
        return self.dim

    def heads(self) -> tuple[int, int]:
        """See `ModelArgs`."""
        return self.n_heads, self.num_kv_heads

    def attention_window(self) -> int | None:
        """See `ModelArgs`."""
        return self.sliding_window

    def tensor_parallel_problems(self, degree: int) -> list[ConfigIssue]:
        """See `ModelArgs`: heads, channels and tokens are shared out, each whole."""
        key, found = "parallelism.tensor_parallel_degree", list(self._left_over(degree))
        candidates = range(1, min(self.n_heads, _MOST_TENSOR_RANKS) + 1) if found else ()
        fitting = [str(ranks) for ranks in candidates if not any(self._left_over(ranks))]
        return [
            ConfigIssue(key, what, f"set it to {' or '.join(fitting)}", degree) for what in found
        ]

    def _left_over(self, degree: int) -> Iterator[str]:
        if self.n_heads % degree:
            yield f"does not divide model.args.n_heads = {self.n_heads}"
        elif self.num_kv_heads % degree and degree % self.num_kv_heads:
            yield f"neither divides model.args.n_kv_heads = {self.num_kv_heads} nor is a multiple"
        if self.ffn_hidden_dim % degree:
            yield f"does not divide the feed-forward's width, {self.ffn_hidden_dim}"
        if self.vocab_size is not None:
            rows = -(-self.vocab_size // degree)  # of every rank but the last ones
            if (degree - 1) * rows >= self.vocab_size:
                yield f"leaves a rank without any of the vocabulary's {self.vocab_size} tokens"

    def problems(self) -> list[ConfigIssue]:
        """Heads that do not divide the width or each other, impossible RoPE bands."""
        found = []
        if self.dim % self.n_heads:
            found.append(
                ConfigIssue(
                    "model.args.n_heads",
                    f"does not divide model.args.dim = {self.dim}",
                    f"set n_heads to a divisor of {self.dim}, or dim to a multiple of it",
                    value=self.n_heads,
                )
            )
        elif self.head_dim % 2:
            found.append(
                ConfigIssue(
                    "model.args.n_heads",
                    f"heads of dim / n_heads = {self.head_dim} channels, but RoPE turns pairs",
                    "choose n_heads so that dim / n_heads is even",
                    value=self.n_heads,
                )
            )
        if self.n_heads % self.num_kv_heads:
            found.append(
                ConfigIssue(
                    "model.args.n_kv_heads",
                    f"does not divide model.args.n_heads = {self.n_heads}",
                    f"set n_kv_heads to a divisor of {self.n_heads}",
                    value=self.n_kv_heads,
                )
            )
        if self.rope_low_freq_factor >= self.rope_high_freq_factor:
            found.append(
                ConfigIssue(
                    "model.args.rope_low_freq_factor",
                    f"not below model.args.rope_high_freq_factor = {self.rope_high_freq_factor}",
                    "set rope_low_freq_factor to a smaller value",
                    value=self.rope_low_freq_factor,
                )
            )
        return found


_VOCAB_SIZE = 128256
SHAPE_70B: dict[str, Any] = {
    "dim": 8192,
    "n_layers": 80,
    "n_heads": 64,
    "n_kv_heads": 8,
    "ffn_dim_multiplier": 1.3,
    "multiple_of": 4096,
}
"""Llama 2's, too."""

FLAVORS: dict[str, LlamaArgs] = {
    "debugmodel": LlamaArgs(dim=256, n_layers=6, n_heads=8, n_kv_heads=4),
    "1B": LlamaArgs(
        vocab_size=_VOCAB_SIZE,
        dim=2048,
        n_layers=16,
        n_heads=32,
        n_kv_heads=8,
        ffn_dim_multiplier=1.5,
        rope_scaling_factor=32.0,
        tied_embeddings=True,
    ),
    "3B": LlamaArgs(
        vocab_size=_VOCAB_SIZE,
        dim=3072,
        n_layers=28,
        n_heads=24,
        n_kv_heads=8,
        rope_scaling_factor=32.0,
        tied_embeddings=True,
    ),
    "8B": LlamaArgs(
        vocab_size=_VOCAB_SIZE,
        dim=4096,
        n_layers=32,
        n_heads=32,
        n_kv_heads=8,
        ffn_dim_multiplier=1.3,
        multiple_of=1024,
        rope_scaling_factor=8.0,
    ),
    "70B": LlamaArgs(vocab_size=_VOCAB_SIZE, rope_scaling_factor=8.0, **SHAPE_70B),
    "405B": LlamaArgs(
        vocab_size=_VOCAB_SIZE,
        dim=16384,
        n_layers=126,
        n_heads=128,
        n_kv_heads=8,
        ffn_dim_multiplier=1.2,
        multiple_of=4096,
        rope_scaling_factor=8.0,
    ),
}
