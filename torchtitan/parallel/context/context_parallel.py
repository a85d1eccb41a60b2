"""Context parallelism: each rank holds a share of each sequence, and attention sees all of it.

Only attention looks beyond its own position, so all other modules run on the share as it is: the
runner shards tokens, labels and positions, and RoPE takes the positions. Two modules of the model
are replaced, `InnerAttention` and `AttentionMaskBuilder`. With `allgather` and `ring` all keys and
values come to a rank's queries (`context_parallel_attention`). With `ulysses` ranks exchange shares
of the sequence for shares of the heads, run the model's own `InnerAttention` on whole sequences,
and exchange back.

Document ids are not sharded: every rank of a sequence reads the same data, so each can tell what
any query sees. Causality and windows go by index in the sequence, not by position.
"""

from dataclasses import dataclass

import torch.distributed as dist
from torch import Tensor, nn
from torch.distributed._functional_collectives import all_to_all_single_autograd
from torch.distributed.device_mesh import DeviceMesh

from torchtitan.config.schema import Parallelism
from torchtitan.models.attention import AttentionMaskBuilder, InnerAttention, Mask, effective_window
from torchtitan.models.batch import Batch
from torchtitan.parallel.context.ring_attention import context_parallel_attention, visibility_levels
from torchtitan.parallel.context.sequence_layout import SequenceLayout


@dataclass(frozen=True)
class ContextParallel:
    """The layout of this rank's sequences over `group`."""

    method: str
    layout: SequenceLayout
    group: dist.ProcessGroup

    @classmethod
    def from_section(cls, section: Parallelism, mesh: DeviceMesh) -> "ContextParallel":
        """Return the configured layout over the ranks of the one-dimensional `mesh`."""
        method = section.context_parallel_method
        balanced = section.context_parallel_load_balancer == "headtail" and method != "ulysses"
        return cls(method, SequenceLayout(mesh.size(), balanced), mesh.get_group())

    @property
    def rank(self) -> int:
        """The rank of this process among those that share its sequences."""
        return self.group.rank()

    def shard_batch(self, batch: Batch) -> Batch:
        """Return this rank's share, `[B, T/n]`, of every tensor `[B, T]` but the document ids.

        Attention needs these whole; `token_document_ids` are those of this rank's tokens.
        """
        shape, chunks = batch["tokens"].shape, self.layout.chunks(self.rank)
        sharded = {
            name: self.layout.select(tensor, chunks)
            for name, tensor in batch.items()
            if tensor.shape == shape and name != "document_ids"
        }
        if "document_ids" in batch:
            sharded["token_document_ids"] = self.layout.select(batch["document_ids"], chunks)
        return Batch({**batch, **sharded})


def apply_context_parallel(model: nn.Module, context: ContextParallel) -> None:
    """Replace the model's attention and mask builders in place."""
    for module in list(model.modules()):
        for name, child in module.named_children():
            if isinstance(child, InnerAttention) and context.method == "ulysses":
                setattr(module, name, UlyssesAttention(child, context))
            elif isinstance(child, InnerAttention):
                setattr(module, name, ContextParallelAttention(context))
            elif isinstance(child, AttentionMaskBuilder) and context.method == "ulysses":
                setattr(module, name, UlyssesMaskBuilder(child, context))
            elif isinstance(child, AttentionMaskBuilder):
                setattr(module, name, ContextParallelMaskBuilder(context, child.window))


class ContextParallelMaskBuilder(nn.Module):
    """The documents and the window that `ContextParallelAttention` needs, in place of a mask."""

    def __init__(self, context: ContextParallel, window: int | None = None):
        super().__init__()
        self._context = context
        self._window = window

    def forward(self, document_ids: Tensor | None, positions: Tensor) -> Mask:
        """Take the whole `document_ids` `[B, T]` and this rank's `positions`."""
        layout, rank = self._context.layout, self._context.rank
        window = effective_window(self._window, positions.size(1) * layout.degree)
        if document_ids is None:
            return None if window is None else (None, None, window)
        return document_ids, visibility_levels(document_ids, layout, rank), window


class ContextParallelAttention(nn.Module):
    """`InnerAttention` for `allgather` and `ring`: keys and values come to the queries."""

    def __init__(self, context: ContextParallel):
        super().__init__()
        self._settings = (context.method, context.layout.balanced, context.group.group_name)

    def forward(self, q: Tensor, k: Tensor, v: Tensor, mask: Mask) -> Tensor:
        """See `InnerAttention`, for this rank's share of the sequence."""
        place = (None, None, None) if mask is None else mask
        return context_parallel_attention(q, k, v, *place, *self._settings)[0]


class UlyssesMaskBuilder(nn.Module):
    """The masks of whole sequences, which `UlyssesAttention` hands to the model's attention."""

    def __init__(self, masks: AttentionMaskBuilder, context: ContextParallel):
        super().__init__()
        self._masks, self._ranks = masks, context.layout.degree

    def forward(self, document_ids: Tensor | None, positions: Tensor) -> Mask:
        """Take the whole `document_ids` `[B, T]` and this rank's `positions`."""
        return self._masks.build(document_ids, positions.size(1) * self._ranks, positions.device)


class UlyssesAttention(nn.Module):
    """The model's attention on whole sequences and a share of the heads."""

    def __init__(self, attend: InnerAttention, context: ContextParallel):
        super().__init__()
        self._attend = attend
        self._group, self._ranks = context.group, context.layout.degree

    def forward(self, q: Tensor, k: Tensor, v: Tensor, mask: Mask) -> Tensor:
        """See `InnerAttention`, for this rank's share of the sequence.

        Ranks share a head of keys and values if there are fewer heads than ranks.
        """
        copies = max(1, self._ranks // k.size(1))
        k, v = (x.repeat_interleave(copies, 1) if copies > 1 else x for x in (k, v))
        out = self._attend(self._to_heads(q), self._to_heads(k), self._to_heads(v), mask)
        return self._to_sequence(out)

    def _to_heads(self, x: Tensor) -> Tensor:
        """`[B, H, T/n, hd]` -> `[B, H/n, T, hd]`."""
        by_rank = x.unflatten(1, (self._ranks, -1)).movedim(1, 0)  # [n, B, H/n, T/n, hd]
        return self._exchange(by_rank).movedim(0, 2).flatten(2, 3)

    def _to_sequence(self, x: Tensor) -> Tensor:
        """`[B, H/n, T, hd]` -> `[B, H, T/n, hd]`."""
        by_rank = x.unflatten(2, (self._ranks, -1)).movedim(2, 0)  # [n, B, H/n, T/n, hd]
        return self._exchange(by_rank).movedim(0, 1).flatten(1, 2)

    def _exchange(self, by_rank: Tensor) -> Tensor:
        """Part i of the first dimension goes to rank i; the result has what came from rank i."""
        return all_to_all_single_autograd(by_rank.contiguous(), None, None, self._group)
