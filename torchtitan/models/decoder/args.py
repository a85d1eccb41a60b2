"""The decoder's hyper-parameters, which a family sets, extends and gives its sizes. No torch."""

from __future__ import annotations

from typing import TYPE_CHECKING, Annotated

from pydantic import Field

from torchtitan.config.errors import ConfigIssue
from torchtitan.config.schema import NormType, PositiveFloat, PositiveInt
from torchtitan.models.spec import ModelArgs

if TYPE_CHECKING:
    from torch import Tensor

    from torchtitan.models.decoder.model import Decoder

Width = Annotated[int, Field(gt=0, le=2**24)]


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

    head_dim: PositiveInt | None = None
    """Channels of a head, an even number. Unset: `dim` / `n_heads`, which must divide evenly."""

    ffn_dim: Width | None = None
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

    sliding_window: PositiveInt | None = None
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

    def scale_rope(self, frequencies: Tensor) -> Tensor:
        """Return RoPE's frequencies `[hd/2]`, in radians per token, adapted to long contexts."""
        return frequencies

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
        return found


def build_decoder(args: DecoderArgs) -> Decoder:
    """Build the decoder; imports torch."""
    from torchtitan.models.decoder.model import Decoder

    return Decoder(args)
