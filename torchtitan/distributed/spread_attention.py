"""Causal attention over a sequence that is spread over ranks; each has its share of q, k and v.

Keys and values come to the queries. `ring` passes them from rank to rank, the next share travelling
while the present one is worked on; in the backward their gradients travel along, and are at home
after a whole round. `allgather` collects them all at once, and sums their gradients with a
reduce-scatter. What comes of different keys is merged, and gradients are added, in at least
float32.

With documents a query sees its own document only. Masks are made of the document ids of the keys
and queries that meet; where `levels` says that no document, or a single one, is in both, there is
no call, or no mask.

This is an operator of its own for torch: a compiler does not look into it, activation checkpointing
can keep its results, and fake tensors pass through it without communication.
"""

from collections.abc import Callable, Iterator, Sequence
from functools import partial
from typing import Any, Protocol

import torch
import torch.distributed as dist
from torch import Tensor, library
from torch.distributed.distributed_c10d import _resolve_process_group

from torchtitan.distributed.attention_kernels import Gradients, Part, choose_kernel, merge
from torchtitan.distributed.sequence_layout import Block, Call, SequenceLayout
from torchtitan.passes.activation_checkpoint import keep_in_checkpoints
from torchtitan.utils.dtypes import at_least_float32
from torchtitan.utils.torch_compat import all_gather_single, reduce_scatter_single

_NOTHING, _ALL = 0, 2
"""Of `visibility_levels`."""
_RESULTS = "Tensor grad, Tensor out, Tensor lse"
_INPUTS = "Tensor q, Tensor k, Tensor v, Tensor? document_ids, Tensor? levels"
_PLACE = "str method, bool balanced, str group_name"


def visibility_levels(document_ids: Tensor, layout: SequenceLayout, rank: int) -> Tensor:
    """How much of each chunk of keys is in the documents of each of the rank's chunks of queries:
    0 is nothing, 1 is perhaps some, 2 is all. int8 `[chunks of the rank, all chunks]`, on the CPU.

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
    "torchtitan::spread_attention",
    mutates_args=(),
    schema=f"({_INPUTS}, {_PLACE}) -> (Tensor, Tensor)",
)
def spread_attention(
    q: Tensor,
    k: Tensor,
    v: Tensor,
    document_ids: Tensor | None,
    levels: Tensor | None,
    method: str,
    balanced: bool,
    group_name: str,
) -> tuple[Tensor, Tensor]:
    """The output `[B, H, T/n, hd]` for this rank's queries, and their log-sum-exp `[B, H, T/n]`.

    `q` is `[B, H, T/n, hd]`, `k` and `v` are `[B, G, T/n, hd]`: this rank's share of a sequence
    over the n ranks of the group, in a `SequenceLayout`. `document_ids` is the whole `[B, T]`,
    `levels` is of `visibility_levels`; both None means plainly causal. The log-sum-exp has no
    gradient. All ranks of the group must call it.
    """
    exchange = _exchange(method, balanced, group_name)
    out = torch.zeros(q.shape, dtype=at_least_float32(q.dtype), device=q.device)
    lse = torch.full(q.shape[:-1], -torch.inf, dtype=out.dtype, device=q.device)
    for block, keys, values in exchange.blocks(k, v):
        for rows, _, part in _parts(exchange, block, q, keys, values, document_ids, levels):
            merge(out[:, :, rows], lse[:, :, rows], *choose_kernel(part).forward(part))
    return out.to(q.dtype), lse


@library.custom_op(
    "torchtitan::spread_attention_backward",
    mutates_args=(),
    schema=f"({_RESULTS}, {_INPUTS}, {_PLACE}) -> (Tensor, Tensor, Tensor)",
)
def _spread_attention_backward(
    grad: Tensor,
    out: Tensor,
    lse: Tensor,
    q: Tensor,
    k: Tensor,
    v: Tensor,
    document_ids: Tensor | None,
    levels: Tensor | None,
    method: str,
    balanced: bool,
    group_name: str,
) -> Gradients:
    exchange = _exchange(method, balanced, group_name)
    dq = torch.zeros(q.shape, dtype=lse.dtype, device=q.device)
    for block, keys, values in exchange.blocks(k, v):
        dk, dv = (torch.zeros(x.shape, dtype=lse.dtype, device=x.device) for x in (keys, values))
        for rows, columns, part in _parts(exchange, block, q, keys, values, document_ids, levels):
            of_q, of_k, of_v = choose_kernel(part).backward(
                part, grad[:, :, rows], out[:, :, rows], lse[:, :, rows]
            )
            dq[:, :, rows] += of_q
            dk[:, :, columns] += of_k
            dv[:, :, columns] += of_v
        exchange.return_gradients(dk, dv)
    dk, dv = exchange.gradients()
    return dq.to(q.dtype), dk.to(k.dtype), dv.to(v.dtype)


@spread_attention.register_fake
def _(q: Tensor, *_: Any) -> tuple[Tensor, Tensor]:
    out = q.new_empty(q.shape)
    return out, q.new_empty(q.shape[:-1], dtype=at_least_float32(q.dtype))


@_spread_attention_backward.register_fake
def _(grad: Tensor, out: Tensor, lse: Tensor, *inputs: Any) -> Gradients:
    q, k, v = (x.new_empty(x.shape) for x in inputs[:3])
    return q, k, v


def _save(ctx: Any, inputs: tuple[Any, ...], output: tuple[Tensor, Tensor]) -> None:
    out, lse = output
    ctx.save_for_backward(out, lse, *inputs[:5])
    ctx.place = inputs[5:]
    ctx.mark_non_differentiable(lse)


def _backward(ctx: Any, grad: Tensor, _: Tensor) -> tuple[Tensor | None, ...]:
    gradients = _spread_attention_backward(grad, *ctx.saved_tensors, *ctx.place)
    return *gradients, None, None, None, None, None


spread_attention.register_autograd(_backward, setup_context=_save)
keep_in_checkpoints(torch.ops.torchtitan.spread_attention.default)


class _Exchange(Protocol):
    """How keys and values come to the queries, and their gradients back."""

    layout: SequenceLayout
    rank: int

    def blocks(self, k: Tensor, v: Tensor) -> Iterator[tuple[Block, Tensor, Tensor]]:
        """What is at hand, one after the other, of all ranks' `k` and `v`."""

    def return_gradients(self, dk: Tensor, dv: Tensor) -> None:
        """This rank's gradients for the block that was last given; to be called for each."""

    def gradients(self) -> Sequence[Tensor]:
        """The sums over all ranks for this rank's `k` and `v`, after all blocks."""


def _exchange(method: str, balanced: bool, group_name: str) -> _Exchange:
    group = _resolve_process_group(group_name)  # type: ignore[arg-type]
    layout = SequenceLayout(group.size(), balanced)
    if method == "ring":
        return _Ring(layout, group)
    assert method == "allgather"
    return _AllGather(layout, group)


class _Ring:
    def __init__(self, layout: SequenceLayout, group: dist.ProcessGroup):
        self.layout = layout
        self.rank = group.rank()
        self._group = group
        self._arrive: Callable[[], Sequence[Tensor]] = tuple

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
        """Send to the next rank; the result waits for what the rank before sends, the same sizes.
        All must be contiguous, and stay as they are until then."""
        size = self.layout.degree
        after, before = (self.rank + 1) % size, (self.rank - 1) % size
        arriving = [torch.empty_like(tensor) for tensor in tensors]
        transfers = []
        for tensor, buffer in zip(tensors, arriving, strict=True):
            transfers.append(dist.P2POp(dist.isend, tensor, group=self._group, group_peer=after))
            transfers.append(dist.P2POp(dist.irecv, buffer, group=self._group, group_peer=before))
        works = dist.batch_isend_irecv(transfers)
        return partial(_wait, works, tensors, arriving)


def _wait(
    works: Sequence[dist.Work], _: Sequence[Tensor], arriving: Sequence[Tensor]
) -> Sequence[Tensor]:
    # What is being sent is an argument, so that it lives until it is.
    for work in works:
        work.wait()
    return arriving


class _AllGather:
    def __init__(self, layout: SequenceLayout, group: dist.ProcessGroup):
        self.layout = layout
        self.rank = group.rank()
        self._group = group
        self._gradients: Sequence[Tensor] = ()

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
    exchange: _Exchange,
    block: Block,
    q: Tensor,
    keys: Tensor,
    values: Tensor,
    document_ids: Tensor | None,
    levels: Tensor | None,
) -> Iterator[tuple[slice, slice, Part]]:
    """The calls of a block: their rows of `q`, columns of `keys`, and what to compute."""
    layout, own = exchange.layout, exchange.layout.chunks(exchange.rank)
    size = q.size(2) // len(own)
    known = None if levels is None else levels.tolist()
    for call in block.calls:
        visible = None
        if document_ids is not None and known is not None:
            queries = [own[i] for i in call.queries]
            others = [block.chunks[j] for j in call.keys]
            found = {known[i][other] for i in call.queries for other in others}
            if found == {_NOTHING}:
                continue
            if found != {_ALL}:
                ids = layout.select(document_ids, queries), layout.select(document_ids, others)
                visible = _same_document(*ids, call)
        rows = slice(call.queries.start * size, call.queries.stop * size)
        columns = slice(call.keys.start * size, call.keys.stop * size)
        causal = call.causal and visible is None
        part = Part(q[:, :, rows], keys[:, :, columns], values[:, :, columns], visible, causal)
        yield rows, columns, part


def _same_document(queries: Tensor, keys: Tensor, call: Call) -> Tensor:
    """Which of the keys, by their document ids, each query sees; `[B, 1, Tq, Tk]`."""
    same = queries.unsqueeze(-1) == keys.unsqueeze(-2)
    return (same.tril_() if call.causal else same).unsqueeze(1)
