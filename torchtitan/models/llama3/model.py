"""Llama 3: a decoder-only transformer (https://arxiv.org/abs/2407.21783).

The residual stream passes through blocks of attention and feed-forward, each behind a norm.
RoPE turns queries and keys by their position; grouped-query attention shares keys and values among
heads.

Shapes: B sequences, T tokens each, D model width, H query heads, G key and value heads (H is a
multiple of G), hd = D / H head size, F feed-forward width, V vocabulary.

Parameter names are those of Meta's checkpoints. The model knows nothing of devices or meshes: the
methods at the end of `Llama` *declare* what the library applies.
"""

import math
import re
from collections.abc import Callable, Collection
from typing import TypeVar

import torch
import torch.nn.functional as F
from torch import Tensor, nn

from torchtitan.models.attend import AttentionMaskBuilder, InnerAttention, Mask
from torchtitan.models.embedding import Embedding
from torchtitan.models.llama3.flavors import LlamaArgs
from torchtitan.models.norms import build_norm
from torchtitan.models.spec import InitRule, TensorParallelStyles, WrapUnit
from torchtitan.utils.dtypes import at_least_float32

S = TypeVar("S")
T = TypeVar("T")
_NORM = re.compile(r"(layers\.\d+\.(attention|ffn)_)?norm\.weight")
_MATRIX = re.compile(r"layers\.(\d+)\.(?:attention|feed_forward)\.(w[qkvo123])\.weight")


def rope_rotations(positions: Tensor, args: LlamaArgs, dtype: torch.dtype) -> Tensor:
    """Each position's turn in each pair of channels, as complex numbers e^(i * angle).

    `positions` is int64 `[B, T]`; the result is `[B, T, 1, hd/2]`, complex, with parts of `dtype`.
    Long wavelengths are stretched as in Llama 3.1, to fit contexts longer than the original one.
    """
    exponents = torch.arange(0, args.head_dim, 2, device=positions.device, dtype=dtype)
    frequencies = args.rope_theta ** (-exponents / args.head_dim)  # [hd/2], radians per token
    if args.rope_scaling_factor != 1.0:
        turns = args.rope_original_max_seq_len * frequencies / (2 * math.pi)  # in the old context
        low, high = args.rope_low_freq_factor, args.rope_high_freq_factor
        kept = ((turns - low) / (high - low)).clamp(0, 1)  # 0: stretched in full, 1: as it was
        frequencies = frequencies * (kept + (1 - kept) / args.rope_scaling_factor)
    angles = positions.unsqueeze(-1) * frequencies  # [B, T, hd/2]
    return torch.polar(torch.ones_like(angles), angles).unsqueeze(2)


def apply_rope(x: Tensor, rotations: Tensor) -> Tensor:
    """Turn each pair of neighbouring channels; `x` is `[B, T, heads, hd]`, and so is the result.

    A complex product is the fastest way on CPUs, four times as fast as one of separate parts.
    """
    pairs = x.to(rotations.real.dtype).unflatten(-1, (-1, 2))  # [B, T, heads, hd/2, 2]
    if torch.compiler.is_compiling():
        # The compiler fuses separate parts, and knows no complex numbers.
        (even, odd), (cos, sin) = pairs.unbind(-1), torch.view_as_real(rotations).unbind(-1)
        turned = torch.stack((even * cos - odd * sin, even * sin + odd * cos), -1)
    else:
        turned = torch.view_as_real(torch.view_as_complex(pairs) * rotations)
    return turned.flatten(-2).to(x.dtype)


class Attention(nn.Module):
    """Grouped-query self-attention with rotary positions."""

    def __init__(self, args: LlamaArgs):
        super().__init__()
        self.head_dim = args.head_dim
        kv_dim = args.num_kv_heads * args.head_dim
        self.wq = nn.Linear(args.dim, args.dim, bias=False)
        self.wk = nn.Linear(args.dim, kv_dim, bias=False)
        self.wv = nn.Linear(args.dim, kv_dim, bias=False)
        self.wo = nn.Linear(args.dim, args.dim, bias=False)
        self.attend = InnerAttention()

    def forward(self, x: Tensor, rotations: Tensor, mask: Mask) -> Tensor:  # [B, T, D]
        # The number of heads is left to the projections' width: a part of them may live here.
        q = self.wq(x).unflatten(-1, (-1, self.head_dim))  # [B, T, H, hd]
        k = self.wk(x).unflatten(-1, (-1, self.head_dim))  # [B, T, G, hd]
        v = self.wv(x).unflatten(-1, (-1, self.head_dim))  # [B, T, G, hd]
        q, k = apply_rope(q, rotations), apply_rope(k, rotations)
        out = self.attend(q.transpose(1, 2), k.transpose(1, 2), v.transpose(1, 2), mask)
        return self.wo(out.transpose(1, 2).flatten(-2))  # [B, H, T, hd] -> [B, T, D]


class FeedForward(nn.Module):
    """SwiGLU: w2(silu(w1 x) * w3 x) (https://arxiv.org/abs/2002.05202)."""

    def __init__(self, args: LlamaArgs):
        super().__init__()
        self.w1 = nn.Linear(args.dim, args.ffn_hidden_dim, bias=False)
        self.w2 = nn.Linear(args.ffn_hidden_dim, args.dim, bias=False)
        self.w3 = nn.Linear(args.dim, args.ffn_hidden_dim, bias=False)

    def forward(self, x: Tensor) -> Tensor:  # [B, T, D] -> [B, T, F] -> [B, T, D]
        return self.w2(F.silu(self.w1(x)) * self.w3(x))


class Block(nn.Module):
    """Attention, then feed-forward, each added to the residual stream."""

    def __init__(self, args: LlamaArgs):
        super().__init__()
        self.attention = Attention(args)
        self.feed_forward = FeedForward(args)
        self.attention_norm = build_norm(args.norm_type, args.dim, args.norm_eps)
        self.ffn_norm = build_norm(args.norm_type, args.dim, args.norm_eps)

    def forward(self, x: Tensor, rotations: Tensor, mask: Mask) -> Tensor:  # [B, T, D]
        x = x + self.attention(self.attention_norm(x), rotations, mask)
        return x + self.feed_forward(self.ffn_norm(x))


class Head(nn.Linear):
    """Hidden states to logits, `[B, T, D]` -> `[B, T, V]`, or to whatever `consume` makes of them.

    `consume(hidden, weight)` runs inside the forward, while the weight `[V, D]` is sure to be
    whole: a loss that never holds all logits at once works there.
    """

    def forward(self, hidden: Tensor, consume: Callable[[Tensor, Tensor], T] | None = None) -> T:
        return F.linear(hidden, self.weight) if consume is None else consume(hidden, self.weight)


class Llama(nn.Module):
    """The model. Build it under `torch.device("meta")` when it is large; it has no buffers."""

    def __init__(self, args: LlamaArgs):
        super().__init__()
        if args.vocab_size is None:
            raise ValueError("vocab_size is unset: resolve the arguments with the tokenizer's size")
        self.args = args
        self.masks = AttentionMaskBuilder(args.sliding_window)
        # The modules at both ends are None in the stages of a pipeline that do without.
        self.tok_embeddings: Embedding | None = Embedding(args.vocab_size, args.dim)
        # Keyed by name, not by place, so that names stay when layers are taken away.
        self.layers = nn.ModuleDict({str(n): Block(args) for n in range(args.n_layers)})
        self.norm: nn.Module | None = build_norm(args.norm_type, args.dim, args.norm_eps)
        self.output: Head | None = Head(args.dim, args.vocab_size, bias=False)
        if args.tied_embeddings:
            self.output.weight = self.tok_embeddings.weight

    def forward(
        self, tokens: Tensor, positions: Tensor, document_ids: Tensor | None = None
    ) -> Tensor:
        """`tokens`, `positions`, `document_ids`: int64 `[B, T]`. Returns hidden states `[B, T, D]`
        after the final norm; `head` makes logits of them. Attention is causal; with `document_ids`
        it also stays within the document, with a sliding window near by."""
        x = tokens if self.tok_embeddings is None else self.tok_embeddings(tokens)  # [B, T, D]
        rotations = rope_rotations(positions, self.args, at_least_float32(x.dtype))
        mask = self.masks(document_ids, positions)
        for block in self.layers.values():
            x = block(x, rotations, mask)
        return x if self.norm is None else self.norm(x)

    def _apply(self, fn: Callable[[Tensor], Tensor], recurse: bool = True) -> "Llama":
        """Moving the model from the meta device makes new parameters: keep the tied ones one."""
        super()._apply(fn, recurse)
        if self.args.tied_embeddings and self.output is not None:
            assert self.tok_embeddings is not None  # the last stage of a pipeline has it, too
            self.output.weight = self.tok_embeddings.weight
        return self

    @property
    def head(self) -> Head | None:
        """The last projection, `[B, T, D]` -> `[B, T, V]`."""
        return self.output

    def keep_modules(self, names: Collection[str]) -> None:
        """Drop the others: the embedding, blocks, the norm and the head of other stages."""
        for key in list(self.layers):
            if f"layers.{key}" not in names:
                del self.layers[key]
        for end in ("tok_embeddings", "norm", "output"):
            if end not in names:
                setattr(self, end, None)

    def blocks(self) -> dict[str, nn.Module]:
        """The blocks by full name, in order."""
        return {f"layers.{key}": block for key, block in self.layers.items()}

    def wrap_units(self) -> list[WrapUnit]:
        """Embeddings, every block, the head; but tied weights serve at both ends: in none."""
        units = [WrapUnit(name, (block,)) for name, block in self.blocks().items()]
        if self.args.tied_embeddings:
            return units
        if self.tok_embeddings is not None:
            units.insert(0, WrapUnit("embeddings", (self.tok_embeddings,)))
        if self.output is not None:
            units.append(WrapUnit("head", (self.output,)))
        return units

    def tensor_parallel_plan(self, styles: TensorParallelStyles[S]) -> dict[str, S]:
        """By columns what makes heads and hidden channels, by rows what adds them up."""
        plan: dict[str, S] = {}
        for name in self.blocks():
            plan |= {
                f"{name}.attention_norm": styles.norm(),
                f"{name}.attention": styles.prepare_module_input(),
                f"{name}.attention.wq": styles.colwise(),
                f"{name}.attention.wk": styles.colwise(units=self.args.num_kv_heads),
                f"{name}.attention.wv": styles.colwise(units=self.args.num_kv_heads),
                f"{name}.attention.wo": styles.rowwise(),
                f"{name}.ffn_norm": styles.norm(),
                f"{name}.feed_forward": styles.prepare_module_input(),
                f"{name}.feed_forward.w1": styles.colwise(),
                f"{name}.feed_forward.w2": styles.rowwise(),
                f"{name}.feed_forward.w3": styles.colwise(),
            }
        if self.tok_embeddings is not None:
            plan["tok_embeddings"] = styles.embedding()
        if self.norm is not None:
            plan["norm"] = styles.norm()
        if self.output is not None:
            plan["output"] = styles.head()
        return plan

    def init_rule(self, name: str) -> InitRule:
        """Matrices start normal, cut at 3 standard deviations; what writes to the residual stream
        starts smaller in deeper layers, so that its variance does not grow with depth. The head
        starts small enough for the first loss to be ln(V): logits of variance 1/16 add only 0.03.
        Raises LookupError for a name that is none of the family's.
        """
        if _NORM.fullmatch(name):
            return InitRule("constant", value=1.0)
        if name == "tok_embeddings.weight" and not self.args.tied_embeddings:
            return InitRule("normal", std=1.0)
        if name in ("tok_embeddings.weight", "output.weight"):
            return InitRule("normal", std=0.25 * self.args.dim**-0.5, cutoff_in_std=3.0)
        found = _MATRIX.fullmatch(name)
        if found is None:
            raise LookupError(
                f"nothing says how {name} starts: it is no parameter of this family. Override"
                " init_rule where it is added, in a subclass of the model or in a handler"
            )
        layer, matrix = found.groups()
        std = 0.02 / math.sqrt(2 * (int(layer) + 1)) if matrix in ("wo", "w2", "w3") else 0.02
        return InitRule("normal", std=std, cutoff_in_std=3.0)

    def flops_per_token(self, seq_len: int, causal: bool) -> float:
        """6 per weight of a matrix product (2 forward, 4 backward), 12 per channel and attended
        position: all, or the last ones that a window leaves; `causal` takes off those that do not
        exist yet, half of all without a window."""
        num_weights = sum(parameter.numel() for parameter in self.parameters())
        if not self.args.tied_embeddings:
            num_weights -= self.args.modules()["tok_embeddings"]  # a look-up, no product
        window = self.masks.window
        attended: float = seq_len if window is None else min(window, seq_len)
        if causal:  # the first queries of a window's length see half of it
            attended -= attended**2 / (2 * seq_len)
        return 6 * num_weights + 12 * self.args.n_layers * self.args.dim * attended
