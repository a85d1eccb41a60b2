"""Causal attention over a sequence whose q, k and v are sharded over ranks.

Keys and values come to the queries. `ring` passes them from rank to rank, the next share travelling
during the computation on the current one; in the backward their gradients travel along, and arrive
home after a whole round. `allgather` collects all of them at once, and sums their gradients with a
reduce-scatter. Outputs for different keys are merged, and gradients added, in at least float32.

With documents a query sees its own document only, with a window only the last tokens. A call whose
queries see no key is skipped, and one whose queries see all keys needs no mask.

This is a custom operator: the compiler does not look into it, activation checkpointing can keep its
results, and fake tensors pass through it without communication.
"""

from collections.abc import Callable, Iterator, Sequence
from dataclasses import replace
from functools import reduce
from typing import Any

import torch
import torch.distributed as dist
from torch import Tensor, library
from torch.distributed.distributed_c10d import _resolve_process_group

from torchtitan.parallel.activation_checkpoint import keep_in_checkpoints
from torchtitan.parallel.context.attention_kernels import Gradients, Part, choose_kernel, merge
from torchtitan.parallel.context.sequence_layout import Block, SequenceLayout
from torchtitan.utils.dtypes import at_least_float32
from torchtitan.utils.torch_compat import all_gather_single, reduce_scatter_single

_NOTHING, _SOME, _ALL = 0, 1, 2  # of `visibility_levels`
_RESULTS = "Tensor grad, Tensor out, Tensor lse"
_INPUTS = "Tensor q, Tensor k, Tensor v, Tensor? document_ids, Tensor? levels"
_SETTINGS = "int? window, str method, bool balanced, str group_name"


def visibility_levels(document_ids: Tensor, layout: SequenceLayout, rank: int) -> Tensor:
    """Return how much of each chunk of keys the rank's chunks of queries see, by documents.

    0 is nothing, 1 is perhaps some, 2 is all; int8 `[chunks of the rank, all chunks]` on the CPU.
    `document_ids` is the whole `[B, T]`. If that is on another device, this waits for the device.
    """
    chunks = document_ids.unflatten(1, (layout.num_chunks, -1))
    lowest, highest = chunks.amin(-1), chunks.amax(-1)  # [B, all chunks]
    own = list(layout.chunks(rank))
    low, high = lowest[:, own].unsqueeze(2), highest[:, own].unsqueeze(2)
    lowest, highest = lowest.unsqueeze(1), highest.unsqueeze(1)
    some = ((low <= highest) & (lowest <= high)).any(0)
    all_ = ((low == highest) & (lowest == high)).all(0)
    return (some.to(torch.int8) + all_).to("cpu")


@library.custom_op(
    "torchtitan::context_parallel_attention",
    mutates_args=(),
    schema=f"({_INPUTS}, {_SETTINGS}) -> (Tensor, Tensor)",
)
def context_parallel_attention(
    q: Tensor,
    k: Tensor,
    v: Tensor,
    document_ids: Tensor | None,
    levels: Tensor | None,
    window: int | None,
    method: str,
    balanced: bool,
    group_name: str,
) -> tuple[Tensor, Tensor]:
    """Return the output `[B, H, T/n, hd]` of this rank's queries and log-sum-exp `[B, H, T/n]`.

    `q` is `[B, H, T/n, hd]`, `k` and `v` are `[B, G, T/n, hd]`: this rank's share of a sequence
    over the n ranks of the group, in a `SequenceLayout`. `document_ids` is the whole `[B, T]`,
    `levels` is of `visibility_levels`, `window` is in tokens; all None means plainly causal. The
    log-sum-exp has no gradient. All ranks of the group must call it.
    """
    exchange, mask = _exchange(method, balanced, group_name), (document_ids, levels, window)
    out = torch.zeros(q.shape, dtype=at_least_float32(q.dtype), device=q.device)
    lse = torch.full(q.shape[:-1], -torch.inf, dtype=out.dtype, device=q.device)
    for block, keys, values in exchange.blocks(k, v):
        for rows, _, part in _parts(exchange, block, (q, keys, values), *mask):
            merge(out[:, :, rows], lse[:, :, rows], *choose_kernel(part).forward(part))
    return out.to(q.dtype), lse


@library.custom_op(
    "torchtitan::context_parallel_attention_backward",
    mutates_args=(),
    schema=f"({_RESULTS}, {_INPUTS}, {_SETTINGS}) -> (Tensor, Tensor, Tensor)",
)
def _context_parallel_attention_backward(
    grad: Tensor, out: Tensor, lse: Tensor, q: Tensor, k: Tensor, v: Tensor, *settings: Any
) -> Gradients:
    exchange, mask = _exchange(*settings[3:]), settings[:3]
    dq = torch.zeros(q.shape, dtype=lse.dtype, device=q.device)
    for block, keys, values in exchange.blocks(k, v):
        dk, dv = (torch.zeros(x.shape, dtype=lse.dtype, device=x.device) for x in (keys, values))
        for rows, columns, part in _parts(exchange, block, (q, keys, values), *mask):
            of_q, of_k, of_v = choose_kernel(part).backward(
                part, grad[:, :, rows], out[:, :, rows], lse[:, :, rows]
            )
            dq[:, :, rows] += of_q
            dk[:, :, columns] += of_k
            dv[:, :, columns] += of_v
        exchange.return_gradients(dk, dv)
    dk, dv = exchange.gradients()
    return dq.to(q.dtype), dk.to(k.dtype), dv.to(v.dtype)


@context_parallel_attention.register_fake
def _(q: Tensor, *_: Any) -> tuple[Tensor, Tensor]:
    out = q.new_empty(q.shape)
    return out, q.new_empty(q.shape[:-1], dtype=at_least_float32(q.dtype))


@_context_parallel_attention_backward.register_fake
def _(grad: Tensor, out: Tensor, lse: Tensor, *inputs: Any) -> Gradients:
    q, k, v = (x.new_empty(x.shape) for x in inputs[:3])
    return q, k, v


def _save(ctx: Any, inputs: tuple[Any, ...], output: tuple[Tensor, Tensor]) -> None:
    out, lse = output
    ctx.save_for_backward(out, lse, *inputs[:5])
    ctx.settings = inputs[5:]
    ctx.mark_non_differentiable(lse)


def _backward(ctx: Any, grad: Tensor, _: Tensor) -> tuple[Tensor | None, ...]:
    gradients = _context_parallel_attention_backward(grad, *ctx.saved_tensors, *ctx.settings)
    return *gradients, *[None] * 6


context_parallel_attention.register_autograd(_backward, setup_context=_save)
keep_in_checkpoints(torch.ops.torchtitan.context_parallel_attention.default)


def _exchange(method: str, balanced: bool, group_name: str) -> "_Ring | _AllGather":
    """Return what brings keys and values to the queries, and their gradients back."""
    group = _resolve_process_group(group_name)  # type: ignore[arg-type]
    layout = SequenceLayout(group.size(), balanced)
    return _Ring(layout, group) if method == "ring" else _AllGather(layout, group)


class _Exchange:
    def __init__(self, layout: SequenceLayout, group: dist.ProcessGroup):
        self.layout, self.rank, self._group = layout, group.rank(), group


class _Ring(_Exchange):
    """Passes shares from rank to rank, and their gradients after them."""

    _arrive: Callable[[], Sequence[Tensor]] = tuple

    def blocks(self, k: Tensor, v: Tensor) -> Iterator[tuple[Block, Tensor, Tensor]]:
        keys, values = k.contiguous(), v.contiguous()
        *others, last = self.layout.blocks_in_turn(self.rank)
        for block in others:
            arrive = self._pass_on(keys, values)
            yield block, keys, values
            keys, values = arrive()
        yield last, keys, values

    def return_gradients(self, dk: Tensor, dv: Tensor) -> None:
        # What the ranks before this one have found for the same block; at first, nothing.
        for own, arrived in zip((dk, dv), self._arrive()):
            own += arrived
        self._arrive = self._pass_on(dk, dv)

    def gradients(self) -> Sequence[Tensor]:
        return self._arrive()

    def _pass_on(self, *tensors: Tensor) -> Callable[[], Sequence[Tensor]]:
        """Send to the next rank; the result waits for the same sizes from the rank before.

        All must be contiguous, and stay unchanged until then.
        """
        size = self.layout.degree
        after, before = (self.rank + 1) % size, (self.rank - 1) % size
        arriving = [torch.empty_like(tensor) for tensor in tensors]
        peers = [(dist.isend, x, after) for x in tensors]
        peers += [(dist.irecv, x, before) for x in arriving]
        transfers = [dist.P2POp(op, x, group=self._group, group_peer=to) for op, x, to in peers]
        works = dist.batch_isend_irecv(transfers)

        def arrive() -> Sequence[Tensor]:
            for work in works:
                work.wait()
            transfers.clear()  # it kept alive what was being sent
            return arriving

        return arrive


class _AllGather(_Exchange):
    """Collects all shares at once, and sums their gradients with a reduce-scatter."""

    _gradients: Sequence[Tensor] = ()

    def blocks(self, k: Tensor, v: Tensor) -> Iterator[tuple[Block, Tensor, Tensor]]:
        yield self.layout.block_of_all(self.rank), self._gather(k), self._gather(v)

    def return_gradients(self, dk: Tensor, dv: Tensor) -> None:
        self._gradients = [self._sum(dk), self._sum(dv)]

    def gradients(self) -> Sequence[Tensor]:
        return self._gradients

    def _gather(self, share: Tensor) -> Tensor:
        """`[B, G, T/n, hd]` -> `[B, G, T, hd]`."""
        ranks = self.layout.degree
        shares = share.new_empty(ranks * share.size(0), *share.shape[1:])
        all_gather_single(shares, share.contiguous(), self._group)
        return self.layout.join(shares.chunk(ranks), dim=2)

    def _sum(self, whole: Tensor) -> Tensor:
        """`[B, G, T, hd]` -> `[B, G, T/n, hd]`, this rank's share of the sum over ranks."""
        layout = self.layout
        shares = [layout.select(whole, layout.chunks(r), dim=2) for r in range(layout.degree)]
        total = torch.empty_like(shares[0])
        reduce_scatter_single(total, torch.cat(shares), self._group)
        return total


def _parts(
    exchange: "_Ring | _AllGather",
    block: Block,
    qkv: tuple[Tensor, Tensor, Tensor],
    document_ids: Tensor | None,
    levels: Tensor | None,
    window: int | None,
) -> Iterator[tuple[slice, slice, Part]]:
    """Yield the calls of a block: rows of queries, columns of keys, and what to compute."""
    (q, keys, values), layout = qkv, exchange.layout
    own = layout.chunks(exchange.rank)
    size = q.size(2) // len(own)
    places = None if window is None else torch.arange(size * layout.num_chunks, device=q.device)
    known = _levels(levels, window, layout, own, size)
    for call in block.calls:
        seen = [j for j in call.keys if any(known[i][block.chunks[j]] for i in call.queries)]
        if not seen:
            continue
        # Of a call that is causal, with itself, no chunk falls away.
        call = replace(call, keys=range(seen[0], seen[-1] + 1))
        chunks = [own[i] for i in call.queries], [block.chunks[j] for j in call.keys]
        visible = None
        if any(known[i][other] != _ALL for i in call.queries for other in chunks[1]):
            found = []
            if document_ids is not None:
                ids = [layout.select(document_ids, those) for those in chunks]
                found.append(_same_document(ids[0], ids[1]))
            if places is not None and window is not None:
                near = [layout.select(places, those, dim=0) for those in chunks]
                found.append(_in_window(near[0], near[1], window))
            visible = reduce(torch.logical_and, found)
            visible = visible.tril() if call.causal else visible
        rows, columns = _tokens(call.queries, size), _tokens(call.keys, size)
        of_part = q[:, :, rows], keys[:, :, columns], values[:, :, columns]
        yield rows, columns, Part(*of_part, visible, call.causal and visible is None)


def _levels(
    levels: Tensor | None, window: int | None, layout: SequenceLayout, own: Sequence[int], size: int
) -> list[list[int]]:
    """Combine `visibility_levels` with the window; chunks have `size` tokens."""
    chunks = range(layout.num_chunks)
    of_documents = [[_ALL] * len(chunks) for _ in own] if levels is None else levels.tolist()
    if window is None:
        return of_documents
    return [
        [min(row[key], _window_level(query - key, size, window)) for key in chunks]
        for query, row in zip(own, of_documents, strict=True)
    ]


def _window_level(chunks_apart: int, size: int, window: int) -> int:
    """Return the level by the distance of the chunks of queries and keys, of `size` tokens."""
    nearest, farthest = (chunks_apart * size + way for way in (1 - size, size - 1))
    if nearest >= window:
        return _NOTHING
    return _ALL if farthest < window else _SOME


def _same_document(queries: Tensor, keys: Tensor) -> Tensor:
    """Return the keys that each query sees by document ids, `[B, 1, Tq, Tk]`."""
    return (queries.unsqueeze(-1) == keys.unsqueeze(-2)).unsqueeze(1)


def _in_window(queries: Tensor, keys: Tensor, window: int) -> Tensor:
    """Return the keys that each query sees by index in the sequence, `[1, 1, Tq, Tk]`."""
    return ((queries - window).unsqueeze(-1) < keys)[None, None]


def _tokens(chunks: range, size: int) -> slice:
    return slice(chunks.start * size, chunks.stop * size)
