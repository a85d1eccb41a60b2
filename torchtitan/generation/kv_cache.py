"""Attention over cached keys and values, put in place of a model's own while it generates.

The model is not changed: `KVCache` replaces its mask builder, every `InnerAttention` and the
forward of its norms from outside, as context parallelism does, and puts them back. All prompts of a
batch end in the same column, since shorter ones are padded on the left, so a new token's keys are
one slice to write.

New tokens of B sequences pass through the model as *one* sequence of B tokens, `[1, B]`: outside of
attention a position is a position. Tensor parallelism, which scatters sequences over ranks, so
needs no more than B rounded up to a multiple of the ranks (`num_queries`).
"""

from dataclasses import dataclass
from functools import partial

import torch
import torch.nn.functional as F
from torch import Tensor, nn

from torchtitan.models.attention import AttentionMaskBuilder, InnerAttention, Mask
from torchtitan.models.norms import RMSNorm

_FIRST_COLUMNS = 256
"""Columns allocated at first; more are added by doubling."""


@dataclass(frozen=True)
class CacheStep:
    """The part of the cache that one forward writes and sees."""

    start: int
    """The first column that it writes."""
    end: int
    """The column after the last one that it writes, or sees."""
    first: int
    """The first column that it sees."""
    mask: Tensor | None
    """bool `[B or 1, 1, T, end - first]`; None: all of them, or plainly causal with `start` 0."""
    rows: int | None
    """Sequences, of which the input holds a token each; None for an input `[B, T]`."""


class KVCache:
    """The keys and values of a batch of sequences; as a context, the model attends to them.

    Columns are those of the padded batch `[B, T]`. `length` columns are filled.
    """

    def __init__(self, model: nn.Module):
        self.length = 0
        self._pads: Tensor | None = None  # [B, 1]: columns before a sequence's first token
        self._is_padded = False
        self._visible: Tensor | None = None  # [B, 1, 1, columns]; None without padding
        self._step: CacheStep | None = None
        self._window: int | None = None
        self._layers: list[_CachedAttention] = []
        self._places: list[tuple[nn.Module, str, nn.Module, nn.Module]] = []
        self._norms = [module for module in model.modules() if isinstance(module, RMSNorm)]
        for module in model.modules():
            for name, child in module.named_children():
                if isinstance(child, InnerAttention):
                    self._layers.append(_CachedAttention())
                    self._places.append((module, name, child, self._layers[-1]))
                elif isinstance(child, AttentionMaskBuilder):
                    self._window = child.window
                    self._places.append((module, name, child, _CacheMasks(self)))
        if not self._layers:
            raise ValueError("the model has no InnerAttention to cache keys and values of")

    def __enter__(self) -> "KVCache":
        for module, name, _, replacement in self._places:
            setattr(module, name, replacement)
        for norm in self._norms:
            norm.forward = partial(_normalise, norm)  # type: ignore[method-assign]
        return self

    def __exit__(self, *details: object) -> None:
        for module, name, own, _ in self._places:
            setattr(module, name, own)
        for norm in self._norms:
            del norm.forward

    @property
    def step(self) -> CacheStep:
        """The forward under way."""
        assert self._step is not None, "extend or extend_by_one comes first"
        return self._step

    @property
    def first_column(self) -> int:
        """The column of the first sequence's first token."""
        assert self._pads is not None
        return int(self._pads[0])

    def start(self, pads: Tensor) -> None:
        """Forget everything; `pads` int64 `[B]` are the columns before each first token."""
        self.length = 0
        self._set_pads(pads.unsqueeze(1))

    def truncate(self, length: int) -> None:
        """Forget all but the first `length` columns."""
        assert length <= self.length
        self.length = length

    def keep(self, rows: Tensor) -> None:
        """Forget all sequences but those of the indices `rows`, int64 `[fewer]`."""
        assert self._pads is not None
        self._set_pads(self._pads[rows])
        for layer in self._layers:
            layer.keep(rows)

    def extend(self, columns: int) -> Tensor:
        """Prepare a forward of `[B, columns]` tokens; return their positions, of that shape."""
        assert self._pads is not None
        start, end = self.length, self.length + columns
        queries = torch.arange(start, end, device=self._pads.device)
        first = 0 if self._window is None else max(0, start + 1 - self._window)
        mask = self._mask(queries, first, end)
        if start == 0 and self._window is None and not self._is_padded:
            mask = None
        self._step, self.length = CacheStep(start, end, first, mask, None), end
        return (queries - self._pads).clamp_min_(0)

    def extend_by_one(self) -> Tensor:
        """Prepare a forward of a token of every sequence, `[1, B]`; return their positions."""
        assert self._pads is not None
        start, rows = self.length, self._pads.size(0)
        first = 0 if self._window is None else max(0, start + 1 - self._window)
        mask = None
        if self._is_padded:
            if self._visible is None or self._visible.size(-1) <= start:
                columns = torch.arange(2 * start + 1, device=self._pads.device)
                self._visible = (columns >= self._pads)[:, None, None]
            mask = self._visible[..., first : start + 1]
        self._step, self.length = CacheStep(start, start + 1, first, mask, rows), start + 1
        return (start - self._pads).view(1, rows)

    def _set_pads(self, pads: Tensor) -> None:
        self._pads, self._is_padded, self._visible = pads, bool(pads.any()), None

    def _mask(self, queries: Tensor, first: int, end: int) -> Tensor:
        """Return the mask of an `extend`; padding sees itself, as attention to nothing is NaN."""
        assert self._pads is not None
        keys = torch.arange(first, end, device=queries.device)
        age = queries.unsqueeze(1) - keys  # [T, keys]
        seen = age >= 0
        if self._window is not None:
            seen &= age < self._window
        seen = seen & (keys >= self._pads).unsqueeze(1) | (age == 0)  # [B, T, keys]
        return seen.unsqueeze(1)


def _normalise(norm: RMSNorm, x: Tensor) -> Tensor:
    """Normalise without what the norm keeps for a backward: half the time for one token."""
    return F.rms_norm(x, norm.weight.shape, norm.weight, norm.eps)


class _CacheMasks(nn.Module):
    """In place of `AttentionMaskBuilder`: hands the forward's `CacheStep` to the attention."""

    def __init__(self, cache: KVCache):
        super().__init__()
        self._cache = cache

    def forward(self, document_ids: Tensor | None, positions: Tensor) -> Mask:
        assert document_ids is None, "a generated sequence is one document"
        return (self._cache.step,)


class _CachedAttention(nn.Module):
    """In place of `InnerAttention`: one layer's keys and values, `[B, G, columns, hd]`."""

    def __init__(self) -> None:
        super().__init__()
        self._keys: Tensor | None = None
        self._values: Tensor | None = None

    def keep(self, rows: Tensor) -> None:
        assert self._keys is not None and self._values is not None
        self._keys, self._values = self._keys[rows], self._values[rows]

    def forward(self, q: Tensor, k: Tensor, v: Tensor, mask: tuple[CacheStep]) -> Tensor:
        """Take and return `[B, H, T, hd]`, or `[1, H, B, hd]` for a token of each sequence."""
        (step,) = mask
        if step.rows is None:
            keys, values = self._write(k, v, step)
            is_causal = step.mask is None
            grouped = q.size(1) != k.size(1)
            return F.scaled_dot_product_attention(
                q, keys, values, attn_mask=step.mask, is_causal=is_causal, enable_gqa=grouped
            )
        queries, rows = q.size(2), step.rows
        q, k, v = q.transpose(0, 2), k.transpose(0, 2), v.transpose(0, 2)  # [B, heads, 1, hd]
        if queries > rows:
            q, k, v = q[:rows], k[:rows], v[:rows]
        keys, values = self._write(k, v, step)
        # Queries that share a head of keys are queries of one sequence: no head is copied.
        of_heads = q.reshape(rows, k.size(1), -1, q.size(3))  # [B, G, H/G, hd]
        out = F.scaled_dot_product_attention(of_heads, keys, values, attn_mask=step.mask)
        out = out.reshape(q.shape)
        if queries > rows:
            out = F.pad(out, (0, 0, 0, 0, 0, 0, 0, queries - rows))
        return out.transpose(0, 2)

    def _write(self, k: Tensor, v: Tensor, step: CacheStep) -> tuple[Tensor, Tensor]:
        """Store the columns of a step; return all that it sees, `[B, G, end - first, hd]`."""
        if step.start == 0:
            self._keys = self._values = None
        if self._keys is None or self._keys.size(2) < step.end:
            self._grow(k, step)
        assert self._keys is not None and self._values is not None
        self._keys.narrow(2, step.start, k.size(2)).copy_(k)
        self._values.narrow(2, step.start, k.size(2)).copy_(v)
        seen = step.first, step.end - step.first
        return self._keys.narrow(2, *seen), self._values.narrow(2, *seen)

    def _grow(self, like: Tensor, step: CacheStep) -> None:
        columns = max(2 * step.start, step.end + _FIRST_COLUMNS)
        batch, heads, _, size = like.shape
        for name in ("_keys", "_values"):
            grown, old = like.new_empty(batch, heads, columns, size), getattr(self, name)
            if old is not None:
                grown[:, :, : step.start] = old[:, :, : step.start]
            setattr(self, name, grown)
