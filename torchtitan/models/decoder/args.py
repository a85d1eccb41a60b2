"""The decoder's hyper-parameters, which a family sets, extends and gives its sizes. No torch."""

from __future__ import annotations

import math
from typing import TYPE_CHECKING, Annotated, Any, Literal

from pydantic import Field

from torchtitan.config.errors import ConfigIssue
from torchtitan.config.schema import NormType, PositiveFloat, PositiveInt
from torchtitan.models.spec import ModelArgs

if TYPE_CHECKING:
    from torch import Tensor

    from torchtitan.models.decoder.model import Decoder

Width = Annotated[int, Field(gt=0, le=2**24)]
RopeScalingType = Literal["llama3", "linear", "yarn"]

_ROPE_SCALINGS: dict[RopeScalingType, tuple[str, ...]] = {
    "llama3": ("rope_original_max_seq_len", "rope_low_freq_factor", "rope_high_freq_factor"),
    "linear": (),
    "yarn": (
        "rope_original_max_seq_len",
        "rope_beta_fast",
        "rope_beta_slow",
        "rope_truncate",
        "rope_attention_factor",
    ),
}
"""Settings that each type of scaling reads in addition to its factor."""


class DecoderArgs(ModelArgs):
    """Hyper-parameters of `Decoder`."""

    dim: Width = 4096
    """Width of the residual stream."""

    n_layers: Annotated[int, Field(gt=0, le=10_000)] = 32
    """Transformer blocks."""

    n_heads: PositiveInt = 32
    """Query heads."""

    n_kv_heads: PositiveInt | None = None
    """Key and value heads, each shared by a group of query heads. Unset: as many as `n_heads`."""

    head_dim: PositiveInt | None = Field(default=None, examples=[128])
    """Channels of a head, an even number. Unset: `dim` / `n_heads`, which must divide evenly."""

    ffn_dim: Width | None = Field(default=None, examples=[14336])
    """Hidden width of the feed-forward. Unset: 4 times `dim`."""

    qkv_bias: bool = False
    """Add a bias to queries, keys and values."""

    qk_norm: bool = False
    """Normalise each head of queries and keys before RoPE."""

    norm_type: NormType = "rmsnorm"
    """Kind of norm; `model.norm_type` sets it."""

    norm_eps: PositiveFloat = 1e-5
    """Added to the mean square in RMSNorm, to the variance in LayerNorm."""

    rope_theta: PositiveFloat = 10000.0
    """Base of the rotary position embedding's wavelengths."""

    rope_scaling_factor: Annotated[float, Field(ge=1)] = 1.0
    """Stretching of RoPE wavelengths for longer contexts; 1 is none."""

    rope_scaling_type: RopeScalingType = "llama3"
    """`llama3` and `yarn` stretch long wavelengths only, as Llama 3.1 and YaRN do; `linear`
    stretches all."""

    rope_original_max_seq_len: PositiveInt = 8192
    """`llama3`, `yarn`: context length before the stretching."""

    rope_low_freq_factor: PositiveFloat = 1.0
    """`llama3`: wavelengths above the original context length divided by this are stretched in
    full."""

    rope_high_freq_factor: PositiveFloat = 4.0
    """`llama3`: wavelengths below the original context length divided by this are not stretched."""

    rope_beta_fast: PositiveFloat = 32.0
    """`yarn`: channels that make more turns than this in the original context are not stretched."""

    rope_beta_slow: PositiveFloat = 1.0
    """`yarn`: channels that make fewer turns than this in the original context are stretched in
    full."""

    rope_truncate: bool = True
    """`yarn`: round the range of channels between these two outwards to whole channels."""

    rope_attention_factor: PositiveFloat | None = None
    """`yarn`: factor of queries and of keys. Unset: 0.1 ln(`rope_scaling_factor`) + 1."""

    sliding_window: PositiveInt | None = Field(default=None, examples=[4096])
    """Each token attends to this many of the latest tokens, itself included. Unset: to all."""

    tied_embeddings: bool = False
    """The head uses the token embedding's matrix."""

    @property
    def num_kv_heads(self) -> int:
        """Key and value heads, resolved."""
        return self.n_heads if self.n_kv_heads is None else self.n_kv_heads

    @property
    def ffn_hidden_dim(self) -> int:
        """Hidden width of the feed-forward, resolved."""
        return 4 * self.dim if self.ffn_dim is None else self.ffn_dim

    @property
    def attention_factor(self) -> float:
        """Factor of queries and of keys, resolved: 1 but for YaRN."""
        if self.rope_scaling_factor == 1.0 or self.rope_scaling_type != "yarn":
            return 1.0
        if self.rope_attention_factor is not None:
            return self.rope_attention_factor
        return 0.1 * math.log(self.rope_scaling_factor) + 1.0

    def rope_scaling(self) -> dict[str, Any]:
        """Return the settings of RoPE's scaling that have an effect; none without scaling."""
        if self.rope_scaling_factor == 1.0:
            return {}
        more = _ROPE_SCALINGS[self.rope_scaling_type]
        return {n: getattr(self, n) for n in ("rope_scaling_type", "rope_scaling_factor", *more)}

    def scale_rope(self, frequencies: Tensor) -> Tensor:
        """Return RoPE's frequencies `[hd/2]`, in radians per token, adapted to long contexts."""
        if self.rope_scaling_factor == 1.0:
            return frequencies
        if self.rope_scaling_type == "linear":
            return frequencies / self.rope_scaling_factor
        if self.rope_scaling_type == "llama3":
            turns = self.rope_original_max_seq_len * frequencies / (2 * math.pi)
            low, high = self.rope_low_freq_factor, self.rope_high_freq_factor
            kept = ((turns - low) / (high - low)).clamp(0, 1)
        else:
            from torch import arange

            first, last = self._yarn_range()
            channels = arange(len(frequencies), device=frequencies.device)
            kept = 1 - ((channels - first) / (last - first or 0.001)).clamp(0, 1)
        # kept: 0 is stretched in full, 1 is unchanged
        return frequencies * (kept + (1 - kept) / self.rope_scaling_factor)

    def _yarn_range(self) -> tuple[float, float]:
        """Return the last channel pair that is not stretched, and the first stretched in full.

        They may be fractions, and lie outside of the head.
        """
        head = self.head_size()
        first, last = (
            head
            * math.log(self.rope_original_max_seq_len / (turns * 2 * math.pi))
            / (2 * math.log(self.rope_theta))
            for turns in (self.rope_beta_fast, self.rope_beta_slow)
        )
        if self.rope_truncate:
            first, last = math.floor(first), math.ceil(last)
        return max(first, 0), min(last, head - 1)

    def modules(self) -> dict[str, int]:
        """See `ModelArgs`."""
        assert self.vocab_size is not None
        head, heads = self.head_size(), self.n_heads + 2 * self.num_kv_heads
        with_weight = self.norm_type != "np_layernorm"
        block = self.dim * head * (heads + self.n_heads) + 3 * self.dim * self.ffn_hidden_dim
        block += head * heads * self.qkv_bias
        block += (2 * self.dim + 2 * head * self.qk_norm) * with_weight
        vocabulary = self.vocab_size * self.dim
        blocks = {f"layers.{n}": block for n in range(self.n_layers)}
        norm = self.dim * with_weight
        return {"tok_embeddings": vocabulary, **blocks, "norm": norm, "output": vocabulary}

    def hidden_size(self) -> int:
        """See `ModelArgs`."""
        return self.dim

    def heads(self) -> tuple[int, int]:
        """See `ModelArgs`."""
        return self.n_heads, self.num_kv_heads

    def head_size(self) -> int:
        """See `ModelArgs`."""
        return self.dim // self.n_heads if self.head_dim is None else self.head_dim

    def attention_window(self) -> int | None:
        """See `ModelArgs`."""
        return self.sliding_window

    def tensor_parallel_problems(self, degree: int) -> list[ConfigIssue]:
        """See `ModelArgs`: heads, channels and tokens are shared out, each whole."""
        found = []
        if self.n_heads % degree:
            found.append(f"does not divide model.args.n_heads = {self.n_heads}")
        elif self.num_kv_heads % degree and degree % self.num_kv_heads:
            heads = f"model.args.n_kv_heads = {self.num_kv_heads}"
            found.append(f"neither divides {heads} nor is a multiple")
        if self.ffn_hidden_dim % degree:
            found.append(f"does not divide the feed-forward's width, {self.ffn_hidden_dim}")
        # Every rank but the last ones has ceil(vocabulary / degree) tokens.
        if self.vocab_size and (degree - 1) * -(-self.vocab_size // degree) >= self.vocab_size:
            found.append(f"leaves a rank without any of the vocabulary's {self.vocab_size} tokens")
        key, fix = "parallelism.tensor_parallel_degree", "set it to a divisor of the heads"
        return [ConfigIssue(key, problem, fix, degree) for problem in found]

    def problems(self) -> list[ConfigIssue]:
        """See `ModelArgs`: sizes of heads, and heads that do not divide each other."""
        found = []
        if self.head_dim is None and self.dim % self.n_heads:
            problem = f"does not divide model.args.dim = {self.dim}"
            fix = "set it to a divisor of dim, or set head_dim"
            found.append(ConfigIssue("model.args.n_heads", problem, fix, self.n_heads))
        elif self.head_size() % 2:
            key = "n_heads" if self.head_dim is None else "head_dim"
            problem = f"RoPE needs an even head size, not {self.head_size()}"
            fix = "choose an even head_dim, or n_heads such that dim / n_heads is even"
            found.append(ConfigIssue(f"model.args.{key}", problem, fix, getattr(self, key)))
        if self.n_heads % self.num_kv_heads:
            problem = f"does not divide model.args.n_heads = {self.n_heads}"
            fix = f"set it to a divisor of {self.n_heads}"
            found.append(ConfigIssue("model.args.n_kv_heads", problem, fix, self.n_kv_heads))
        for low, high in (
            ("rope_low_freq_factor", "rope_high_freq_factor"),
            ("rope_beta_slow", "rope_beta_fast"),
        ):
            if getattr(self, low) >= getattr(self, high):
                problem = f"not below model.args.{high} = {getattr(self, high)}"
                value = getattr(self, low)
                found.append(
                    ConfigIssue(f"model.args.{low}", problem, "set a smaller value", value)
                )
        return found or self._yarn_problems()

    def _yarn_problems(self) -> list[ConfigIssue]:
        """Return why YaRN cannot stretch these wavelengths."""
        if "rope_beta_fast" not in self.rope_scaling():
            return []
        if self.rope_theta <= 1:
            problem, fix = "YaRN needs wavelengths that grow", "set it above 1"
            return [ConfigIssue("model.args.rope_theta", problem, fix, self.rope_theta)]
        first, last = self._yarn_range()
        if first <= last:
            return []
        problem = "YaRN finds no channels to stretch in a context of this length"
        fix = "set it to the length that the model was trained with"
        key, value = "model.args.rope_original_max_seq_len", self.rope_original_max_seq_len
        return [ConfigIssue(key, problem, fix, value)]


def build_decoder(args: DecoderArgs) -> Decoder:
    """Build the decoder; imports torch."""
    from torchtitan.models.decoder.model import Decoder

    return Decoder(args)
