"""A decoder-only transformer: Llama (https://arxiv.org/abs/2407.21783) and its relatives.

The residual stream passes through blocks of attention and feed-forward, each behind a norm.
RoPE turns queries and keys by their position; grouped-query attention shares keys and values among
heads.

Shapes: B sequences, T tokens each, D model width, H query heads, G key and value heads (H is a
multiple of G), hd head size, F feed-forward width, V vocabulary.

Parameter names are those of Meta's checkpoints. The model knows nothing of devices or meshes: the
methods at the end of `Decoder` and `Block` *declare* what the library applies. To vary attention,
feed-forward or block, subclass them and name the subclass in the class that builds it
(`attention_type`, `feed_forward_type`, `block_type`).
"""

import math
import re
from collections.abc import Callable, Collection
from typing import TypeVar

import torch
import torch.nn.functional as F
from torch import Tensor, nn

from torchtitan.models.attention import AttentionMaskBuilder, InnerAttention, Mask
from torchtitan.models.decoder.args import DecoderArgs
from torchtitan.models.embedding import Embedding
from torchtitan.models.norms import build_norm
from torchtitan.models.spec import InitRule, TensorParallelStyles, WrapUnit
from torchtitan.utils.dtypes import at_least_float32

S = TypeVar("S")
T = TypeVar("T")
_NORM = re.compile(r"(layers\.\d+\.(attention|ffn)_)?norm\.weight")
_HEAD_NORM = re.compile(r"layers\.\d+\.attention\.[qk]_norm\.weight")
_BIAS = re.compile(r"layers\.\d+\.attention\.w[qkv]\.bias")
_MATRIX = re.compile(r"layers\.(\d+)\.(?:attention|feed_forward)\.(w[qkvo123])\.weight")


def rope_rotations(positions: Tensor, args: DecoderArgs, dtype: torch.dtype) -> Tensor:
    """Return each position's turn in each pair of channels, as complex numbers e^(i * angle).

    `positions` is int64 `[B, T]`; the result is `[B, T, 1, hd/2]`, complex, with parts of `dtype`.
    YaRN's are longer than 1, by `attention_factor`.
    """
    head_dim = args.head_size()
    exponents = torch.arange(0, head_dim, 2, device=positions.device, dtype=dtype)
    frequencies = args.rope_theta ** (-exponents / head_dim)  # [hd/2], radians per token
    angles = positions.unsqueeze(-1) * args.scale_rope(frequencies)  # [B, T, hd/2]
    return torch.polar(torch.full_like(angles, args.attention_factor), angles).unsqueeze(2)


def apply_rope(x: Tensor, rotations: Tensor) -> Tensor:
    """Turn each pair of neighbouring channels; `x` and the result are `[B, T, heads, hd]`.

    On CPUs a complex product is four times as fast as a product of separate parts.
    """
    pairs = x.to(rotations.real.dtype).unflatten(-1, (-1, 2))  # [B, T, heads, hd/2, 2]
    if torch.compiler.is_compiling():
        # The compiler fuses separate parts and does not support complex numbers.
        (even, odd), (cos, sin) = pairs.unbind(-1), torch.view_as_real(rotations).unbind(-1)
        turned = torch.stack((even * cos - odd * sin, even * sin + odd * cos), -1)
    else:
        turned = torch.view_as_real(torch.view_as_complex(pairs) * rotations)
    return turned.flatten(-2).to(x.dtype)


class Attention(nn.Module):
    """Grouped-query self-attention with rotary positions."""

    def __init__(self, args: DecoderArgs):
        super().__init__()
        self.head_dim = args.head_size()
        q_dim, kv_dim = args.n_heads * self.head_dim, args.num_kv_heads * self.head_dim
        self.wq = nn.Linear(args.dim, q_dim, bias=args.qkv_bias)
        self.wk = nn.Linear(args.dim, kv_dim, bias=args.qkv_bias)
        self.wv = nn.Linear(args.dim, kv_dim, bias=args.qkv_bias)
        self.wo = nn.Linear(q_dim, args.dim, bias=False)
        if args.qk_norm:
            self.q_norm = build_norm(args.norm_type, self.head_dim, args.norm_eps)
            self.k_norm = build_norm(args.norm_type, self.head_dim, args.norm_eps)
        self.qk_norm = args.qk_norm
        self.attend = InnerAttention()

    def project(self, x: Tensor) -> tuple[Tensor, Tensor, Tensor]:  # [B, T, D]
        """Return queries `[B, T, H, hd]`, keys and values `[B, T, G, hd]`, before RoPE."""
        # Head counts come from the projections: under tensor parallelism a rank holds some heads.
        q = self.wq(x).unflatten(-1, (-1, self.head_dim))
        k = self.wk(x).unflatten(-1, (-1, self.head_dim))
        v = self.wv(x).unflatten(-1, (-1, self.head_dim))
        return (self.q_norm(q), self.k_norm(k), v) if self.qk_norm else (q, k, v)

    def forward(self, x: Tensor, rotations: Tensor, mask: Mask) -> Tensor:
        """Attend within the sequences `x` `[B, T, D]`; the result is of the same shape."""
        q, k, v = self.project(x)
        q, k = apply_rope(q, rotations), apply_rope(k, rotations)
        out = self.attend(q.transpose(1, 2), k.transpose(1, 2), v.transpose(1, 2), mask)
        return self.wo(out.transpose(1, 2).flatten(-2))  # [B, H, T, hd] -> [B, T, D]


class FeedForward(nn.Module):
    """SwiGLU: w2(silu(w1 x) * w3 x) (https://arxiv.org/abs/2002.05202)."""

    def __init__(self, args: DecoderArgs):
        super().__init__()
        self.w1 = nn.Linear(args.dim, args.ffn_hidden_dim, bias=False)
        self.w2 = nn.Linear(args.ffn_hidden_dim, args.dim, bias=False)
        self.w3 = nn.Linear(args.dim, args.ffn_hidden_dim, bias=False)

    def forward(self, x: Tensor) -> Tensor:
        """Transform each position: `[B, T, D]` -> `[B, T, F]` -> `[B, T, D]`."""
        return self.w2(F.silu(self.w1(x)) * self.w3(x))


class Block(nn.Module):
    """Attention, then feed-forward, each added to the residual stream."""

    attention_type: type[nn.Module] = Attention
    feed_forward_type: type[nn.Module] = FeedForward

    def __init__(self, args: DecoderArgs):
        super().__init__()
        self.args = args
        self.attention = self.attention_type(args)
        self.feed_forward = self.feed_forward_type(args)
        self.attention_norm = build_norm(args.norm_type, args.dim, args.norm_eps)
        self.ffn_norm = build_norm(args.norm_type, args.dim, args.norm_eps)

    def forward(self, x: Tensor, rotations: Tensor, mask: Mask) -> Tensor:
        """Add to the residual stream `x` `[B, T, D]`."""
        x = x + self.attention(self.attention_norm(x), rotations, mask)
        return x + self.feed_forward(self.ffn_norm(x))

    def tensor_parallel_plan(self, styles: TensorParallelStyles[S]) -> dict[str, S]:
        """Return a style by module name: heads and channels by columns, their sums by rows."""
        plan = {
            "attention_norm": styles.norm(),
            "attention": styles.prepare_module_input(),
            "attention.wq": styles.colwise(),
            "attention.wk": styles.colwise(units=self.args.num_kv_heads),
            "attention.wv": styles.colwise(units=self.args.num_kv_heads),
            "attention.wo": styles.rowwise(),
            "ffn_norm": styles.norm(),
            "feed_forward": styles.prepare_module_input(),
            "feed_forward.w1": styles.colwise(),
            "feed_forward.w2": styles.rowwise(),
            "feed_forward.w3": styles.colwise(),
        }
        if self.args.qk_norm:
            plan |= {"attention.q_norm": styles.norm(), "attention.k_norm": styles.norm()}
        return plan


class Head(nn.Linear):
    """Hidden states to logits, `[B, T, D]` -> `[B, T, V]`, or to whatever `consume` makes of them.

    `consume(hidden, weight)` runs inside the forward, while the weight `[V, D]` is gathered: there
    a loss can avoid holding all logits at once.
    """

    def forward(self, hidden: Tensor, consume: Callable[[Tensor, Tensor], T] | None = None) -> T:
        """Return logits, or `consume(hidden, weight)`."""
        return F.linear(hidden, self.weight) if consume is None else consume(hidden, self.weight)


class Decoder(nn.Module):
    """The model. Build it under `torch.device("meta")` when it is large; it has no buffers."""

    block_type: type[Block] = Block

    def __init__(self, args: DecoderArgs):
        super().__init__()
        if args.vocab_size is None:
            raise ValueError("vocab_size is unset: resolve the arguments with the tokenizer's size")
        self.args = args
        self.masks = AttentionMaskBuilder(args.sliding_window)
        # The modules at both ends are None in pipeline stages that lack them.
        self.tok_embeddings: Embedding | None = Embedding(args.vocab_size, args.dim)
        # Keyed by name, not by index, so that names stay when layers are dropped.
        self.layers = nn.ModuleDict({str(n): self.block_type(args) for n in range(args.n_layers)})
        self.norm: nn.Module | None = build_norm(args.norm_type, args.dim, args.norm_eps)
        self.output: Head | None = Head(args.dim, args.vocab_size, bias=False)
        if args.tied_embeddings:
            self.output.weight = self.tok_embeddings.weight

    def forward(
        self, tokens: Tensor, positions: Tensor, document_ids: Tensor | None = None
    ) -> Tensor:
        """Return hidden states `[B, T, D]` after the final norm, which `head` turns into logits.

        `tokens`, `positions`, `document_ids` are int64 `[B, T]`. Attention is causal, within the
        document if there are ids, and within the sliding window if there is one.
        """
        x = tokens if self.tok_embeddings is None else self.tok_embeddings(tokens)  # [B, T, D]
        rotations = rope_rotations(positions, self.args, at_least_float32(x.dtype))
        mask = self.masks(document_ids, positions)
        for block in self.layers.values():
            x = block(x, rotations, mask)
        return x if self.norm is None else self.norm(x)

    def _apply(self, fn: Callable[[Tensor], Tensor], recurse: bool = True) -> "Decoder":
        """Keep tied weights one parameter when the model leaves the meta device."""
        super()._apply(fn, recurse)
        if self.args.tied_embeddings and self.output is not None:
            assert self.tok_embeddings is not None  # the last stage of a pipeline has it, too
            # Past the attribute: under tensor parallelism that is this rank's part.
            self.output._parameters["weight"] = self.tok_embeddings._parameters["weight"]
        return self

    @property
    def head(self) -> Head | None:
        """The last layer, `[B, T, D]` -> `[B, T, V]`."""
        return self.output

    def keep_modules(self, names: Collection[str]) -> None:
        """Drop all other modules: embedding, blocks, norm and head of other stages."""
        for key in list(self.layers):
            if f"layers.{key}" not in names:
                del self.layers[key]
        for end in ("tok_embeddings", "norm", "output"):
            if end not in names:
                setattr(self, end, None)

    def blocks(self) -> dict[str, nn.Module]:
        """Return the blocks by full name, in order."""
        return {f"layers.{key}": block for key, block in self.layers.items()}

    def wrap_units(self) -> list[WrapUnit]:
        """Return embeddings, every block and the head, but no tied weights."""
        units = [WrapUnit(name, (block,)) for name, block in self.blocks().items()]
        if self.args.tied_embeddings:
            return units
        if self.tok_embeddings is not None:
            units.insert(0, WrapUnit("embeddings", (self.tok_embeddings,)))
        if self.output is not None:
            units.append(WrapUnit("head", (self.output,)))
        return units

    def tensor_parallel_plan(self, styles: TensorParallelStyles[S]) -> dict[str, S]:
        """Return a style by full module name."""
        plan: dict[str, S] = {}
        for key, block in self.layers.items():
            inside = block.tensor_parallel_plan(styles)
            plan |= {f"layers.{key}.{name}": style for name, style in inside.items()}
        if self.tok_embeddings is not None:
            plan["tok_embeddings"] = styles.embedding()
        if self.norm is not None:
            plan["norm"] = styles.norm()
        if self.output is not None:
            plan["output"] = styles.head()
        return plan

    def init_rule(self, name: str) -> InitRule:
        """Return how a parameter starts. Raises LookupError for a name the model does not have.

        Matrices start normal, cut at 3 standard deviations. Those that write to the residual stream
        start smaller in deeper layers, so that its variance does not grow with depth. The head
        starts small enough for a first loss of ln(V): logits of variance 1/16 add only 0.03.
        """
        if _NORM.fullmatch(name) or (self.args.qk_norm and _HEAD_NORM.fullmatch(name)):
            return InitRule("constant", value=1.0)
        if self.args.qkv_bias and _BIAS.fullmatch(name):
            return InitRule("constant")
        if name == "tok_embeddings.weight" and not self.args.tied_embeddings:
            return InitRule("normal", std=1.0)
        if name in ("tok_embeddings.weight", "output.weight"):
            return InitRule("normal", std=0.25 * self.args.dim**-0.5, cutoff_in_std=3.0)
        found = _MATRIX.fullmatch(name)
        if found is None:
            raise LookupError(
                f"nothing says how {name} starts: the model has no such parameter. Override"
                " init_rule where it is added, in a subclass of the model or in a handler"
            )
        layer, matrix = found.groups()
        std = 0.02 / math.sqrt(2 * (int(layer) + 1)) if matrix in ("wo", "w2", "w3") else 0.02
        return InitRule("normal", std=std, cutoff_in_std=3.0)

    def flops_per_token(self, seq_len: int, causal: bool) -> float:
        """Return 6 per weight of a matrix product and 12 per channel and attended position.

        Of 6, 2 are for the forward, 2 for the gradient of the input, and 2 for that of the weight,
        which a frozen one does not need. All positions count, or those within the
        window; `causal` subtracts those that do not exist yet, half of all without a window.
        """
        products = set(self.parameters())
        if self.tok_embeddings is not None and not self.args.tied_embeddings:
            products.discard(self.tok_embeddings.weight)  # a look-up
        # A quantised matrix is held in fewer elements than it has weights.
        counted = ((w, getattr(w, "num_weights", w.numel())) for w in products)
        of_weights = sum(number * (6 if w.requires_grad else 4) for w, number in counted)
        window = self.masks.window
        attended: float = seq_len if window is None else min(window, seq_len)
        if causal:  # the first queries of a window's length see half of it
            attended -= attended**2 / (2 * seq_len)
        channels = len(self.layers) * self.args.n_heads * self.args.head_size()
        return of_weights + 12 * channels * attended
