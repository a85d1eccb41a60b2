"""Attention of some queries over some keys, made so that several results can be merged.

softmax(q k^T / sqrt(hd)) v over all keys is a weighted mean of the same over parts of them, with
weights that follow from the log-sum-exp of each part's scores. So the forward of a part returns its
log-sum-exp too, and `merge` adds the part to what is there. The backward of a part takes the output
and log-sum-exp of the *whole*, and then gives just that part's share of the gradients.

There is a kernel of torch's for CPUs, one for CUDA in bfloat16 where nothing is masked, and for all
else the formula written out. Queries are `[B, H, Tq, hd]`, keys and values `[B, G, Tk, hd]` where G
divides H; a log-sum-exp is `[B, H, Tq]`, in at least float32, -inf for a query that sees nothing.
"""

import math
from collections.abc import Callable, Iterator
from typing import NamedTuple

import torch
from torch import Tensor

from torchtitan.utils.dtypes import at_least_float32

_ATEN = torch.ops.aten
_MAX_SCORES = 2**28
"""Scores that the written-out formula holds at a time."""


class Part(NamedTuple):
    """Queries, the keys and values that they may see, and which of these they do see."""

    q: Tensor
    k: Tensor
    v: Tensor
    visible: Tensor | None
    """Bool `[B, 1, Tq, Tk]`. None: all, or, if `causal`, all up to the query's own index."""
    causal: bool
    """For Tq = Tk and without `visible`."""


Gradients = tuple[Tensor, Tensor, Tensor]  # of q, k and v


class Kernel(NamedTuple):
    """A forward and a backward of attention over a part of the keys.

    `forward(part)` gives output and log-sum-exp; `backward(part, grad, out, lse)` takes those of
    all keys, and the gradient for that output.
    """

    forward: Callable[[Part], tuple[Tensor, Tensor]]
    backward: Callable[[Part, Tensor, Tensor, Tensor], Gradients]


def choose_kernel(part: Part) -> Kernel:
    """Return the fastest kernel that can compute `part`."""
    q = part.q
    if q.device.type == "cpu":
        return CPU
    flash = q.dtype == torch.bfloat16 and q.size(-1) % 8 == 0 and q.size(-1) <= 256
    return CUDA_FLASH if q.is_cuda and flash and part.visible is None else FORMULA


def merge(out: Tensor, lse: Tensor, part_out: Tensor, part_lse: Tensor) -> None:
    """Add what other keys gave to `out` and `lse`, in place; they start as 0 and -inf."""
    total = torch.logaddexp(lse, part_lse)
    out.mul_(_weight(lse, total)).add_(part_out * _weight(part_lse, total))
    lse.copy_(total)


def _weight(lse: Tensor, total: Tensor) -> Tensor:
    # While a query has seen nothing yet both are -inf, and the exponential of their difference NaN.
    return (lse - total).exp_().nan_to_num_(nan=0.0).unsqueeze(-1)


def _cpu_forward(part: Part) -> tuple[Tensor, Tensor]:
    q, k, v, visible, causal = part
    out, lse = _ATEN._scaled_dot_product_flash_attention_for_cpu(
        q, k, v, 0.0, causal, attn_mask=_additive(visible, q)
    )
    if visible is not None:
        # For a query that sees nothing the kernel says 0.
        lse = lse.masked_fill(~visible.any(-1), -math.inf)
    return out, lse


def _cpu_backward(part: Part, grad: Tensor, out: Tensor, lse: Tensor) -> Gradients:
    q, k, v, visible, causal = part
    return _ATEN._scaled_dot_product_flash_attention_for_cpu_backward(
        grad, q, k, v, out, lse, 0.0, causal, attn_mask=_additive(visible, q)
    )


def _additive(visible: Tensor | None, q: Tensor) -> Tensor | None:
    if visible is None:
        return None
    # Of the type of q: the kernel takes float32 with float64 too, and misreads it.
    zeros = torch.zeros_like(visible, dtype=q.dtype)
    return zeros.masked_fill_(~visible, -math.inf)


def _cuda_flash_forward(part: Part) -> tuple[Tensor, Tensor]:
    q, k, v, _, causal = part
    out, lse, *_ = _ATEN._scaled_dot_product_flash_attention(q, k, v, 0.0, causal)
    return out, lse


def _cuda_flash_backward(part: Part, grad: Tensor, out: Tensor, lse: Tensor) -> Gradients:
    q, k, v, _, causal = part
    # Sequences all of one length have no table of starts, and without dropout nothing is random.
    starts = (None, None, q.size(2), k.size(2))
    random_state = torch.empty(2, dtype=torch.uint64, device=q.device)
    return _ATEN._scaled_dot_product_flash_attention_backward(
        grad, q, k, v, out, lse.contiguous(), *starts, 0.0, causal, random_state, random_state
    )


def _formula_forward(part: Part) -> tuple[Tensor, Tensor]:
    outs, lses = [], []
    for rows in _row_slices(part):
        scores = _scores(part, rows)
        lse = scores.logsumexp(-1)
        probabilities = (scores - lse.unsqueeze(-1)).exp_().nan_to_num_(nan=0.0)
        outs.append(_unfold(probabilities @ part.v.to(scores.dtype), part))
        lses.append(_unfold(lse, part))
    return torch.cat(outs, 2), torch.cat(lses, 2)


def _formula_backward(part: Part, grad: Tensor, out: Tensor, lse: Tensor) -> Gradients:
    dtype = at_least_float32(part.q.dtype)
    q, k, v, grad, out = (x.to(dtype) for x in (part.q, part.k, part.v, grad, out))
    dq, dk, dv = [], torch.zeros_like(k), torch.zeros_like(v)
    for rows in _row_slices(part):
        upstream = _fold(grad[:, :, rows], k)
        mean = (upstream * _fold(out[:, :, rows], k)).sum(-1, keepdim=True)
        probabilities = (_scores(part, rows) - _fold(lse[:, :, rows], k).unsqueeze(-1)).exp_()
        dv += probabilities.transpose(-2, -1) @ upstream
        of_scores = probabilities * (upstream @ v.transpose(-2, -1) - mean) * q.size(-1) ** -0.5
        dq.append(_unfold(of_scores @ k, part))
        dk += of_scores.transpose(-2, -1) @ _fold(q[:, :, rows], k)
    return torch.cat(dq, 2), dk, dv


def _row_slices(part: Part) -> Iterator[slice]:
    """Queries, as many at a time as memory is to be spent on their scores."""
    size = max(1, _MAX_SCORES // (part.q.size(0) * part.q.size(1) * part.k.size(2)))
    for start in range(0, part.q.size(2), size):
        yield slice(start, start + size)


def _scores(part: Part, rows: slice) -> Tensor:
    """Return the scores of these queries, `[B, G, H/G * rows, Tk]`, -inf where not visible."""
    q, k, visible, dtype = part.q, part.k, part.visible, at_least_float32(part.q.dtype)
    scores = _fold(q[:, :, rows].to(dtype) * q.size(-1) ** -0.5, k) @ k.to(dtype).transpose(-2, -1)
    if part.causal:
        square = torch.ones(q.size(2), k.size(2), dtype=torch.bool, device=q.device)
        visible = square.tril_()[None, None]
    if visible is not None:
        group_size = q.size(1) // k.size(1)
        scores.masked_fill_(~visible[:, :, rows].repeat(1, 1, group_size, 1), -math.inf)
    return scores


def _fold(x: Tensor, k: Tensor) -> Tensor:
    """`[B, H, T, ...]` -> `[B, G, H/G * T, ...]`: the queries that share keys, head after head."""
    return x.unflatten(1, (k.size(1), -1)).flatten(2, 3)


def _unfold(x: Tensor, part: Part) -> Tensor:
    """`[B, G, H/G * T, ...]` -> `[B, H, T, ...]`."""
    return x.unflatten(2, (part.q.size(1) // part.k.size(1), -1)).flatten(1, 2)


CPU = Kernel(_cpu_forward, _cpu_backward)
CUDA_FLASH = Kernel(_cuda_flash_forward, _cuda_flash_backward)
FORMULA = Kernel(_formula_forward, _formula_backward)
