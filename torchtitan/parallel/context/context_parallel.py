"""Context parallelism: every rank holds a share of each sequence, and attention sees all of it.

Only attention looks beyond its own position, so all else runs on the share as it is: tokens, labels
and positions are cut by the runner, RoPE takes the positions. The model's `InnerAttention`
modules are replaced, by one of three methods. `allgather` and `ring` bring all keys and values to a
rank's queries (`spread_attention`). `ulysses` exchanges shares of the sequence for shares of the
heads, runs the model's own `InnerAttention` on whole sequences, and exchanges back.

Document ids are not cut: every rank of a sequence reads the same data, so each can tell what any
query sees. Causality and windows go by index in the sequence, whatever the positions are.
"""

from dataclasses import dataclass

import torch.distributed as dist
from torch import Tensor, nn
from torch.distributed._functional_collectives import all_to_all_single_autograd
from torch.distributed.device_mesh import DeviceMesh

from torchtitan.config.schema import Parallelism
from torchtitan.models.attend import AttentionMaskBuilder, InnerAttention, Mask, limit
from torchtitan.models.batch import Batch
from torchtitan.parallel.context.ring_attention import spread_attention, visibility_levels
from torchtitan.parallel.context.sequence_layout import SequenceLayout


@dataclass(frozen=True)
class ContextParallel:
    """How this rank's sequences are spread over `group`."""

    method: str
    layout: SequenceLayout
    group: dist.ProcessGroup

    @classmethod
    def of(cls, section: Parallelism, mesh: DeviceMesh) -> "ContextParallel":
        """As the config says, over the ranks of the one-dimensional `mesh`."""
        method = section.context_parallel_method
        balanced = section.context_parallel_load_balancer == "headtail" and method != "ulysses"
        return cls(method, SequenceLayout(mesh.size(), balanced), mesh.get_group())

    @property
    def rank(self) -> int:
        """This process, among those that share its sequences."""
        return self.group.rank()

    def cut(self, batch: Batch) -> Batch:
        """This rank's share of every tensor with a value per position, `[B, T]` to `[B, T/n]`; but
        document ids stay whole."""
        shape, chunks = batch["tokens"].shape, self.layout.chunks(self.rank)
        return Batch(
            {
                name: self.layout.select(tensor, chunks)
                if tensor.shape == shape and name != "document_ids"
                else tensor
                for name, tensor in batch.items()
            }
        )


def apply_context_parallel(model: nn.Module, context: ContextParallel) -> None:
    """Replace how `model` attends, and what it makes of document ids, in place."""
    for module in list(model.modules()):
        for name, child in module.named_children():
            if isinstance(child, InnerAttention) and context.method == "ulysses":
                setattr(module, name, UlyssesAttention(child, context))
            elif isinstance(child, InnerAttention):
                setattr(module, name, SpreadAttend(context))
            elif isinstance(child, AttentionMaskBuilder) and context.method == "ulysses":
                setattr(module, name, ExchangedMasks(child, context))
            elif isinstance(child, AttentionMaskBuilder):
                setattr(module, name, SpreadMasks(context, child.window))


class SpreadMasks(nn.Module):
    """Replaces `AttentionMaskBuilder`: the documents and the window that `SpreadAttend` needs."""

    def __init__(self, context: ContextParallel, window: int | None = None):
        super().__init__()
        self._context = context
        self._window = window

    def forward(self, document_ids: Tensor | None, positions: Tensor) -> Mask:
        """`document_ids` is the whole `[B, T]`, `positions` are this rank's."""
        context = self._context
        window = limit(self._window, positions.size(1) * context.layout.degree)
        if document_ids is None:
            return None if window is None else (None, None, window)
        return document_ids, visibility_levels(document_ids, context.layout, context.rank), window


class SpreadAttend(nn.Module):
    """Replaces `InnerAttention` for `allgather` and `ring`: keys and values come to the queries."""

    def __init__(self, context: ContextParallel):
        super().__init__()
        self._settings = (context.method, context.layout.balanced, context.group.group_name)

    def forward(self, q: Tensor, k: Tensor, v: Tensor, mask: Mask) -> tuple[Tensor, Tensor | None]:
        """See `InnerAttention`, for this rank's share of the sequence."""
        document_ids, levels, window = (None, None, None) if mask is None else mask
        out, lse = spread_attention(q, k, v, document_ids, levels, window, *self._settings)
        return out, lse


class ExchangedMasks(nn.Module):
    """Replaces `AttentionMaskBuilder`, for `ulysses`: the mask of whole sequences for `attend`."""

    def __init__(self, masks: AttentionMaskBuilder, context: ContextParallel):
        super().__init__()
        self._masks = masks
        self._ranks = context.layout.degree

    def forward(self, document_ids: Tensor | None, positions: Tensor) -> Mask:
        """`document_ids` is the whole `[B, T]`, `positions` are this rank's."""
        return self._masks.build(document_ids, positions.size(1) * self._ranks, positions.device)


class UlyssesAttention(nn.Module):
    """Replaces `InnerAttention` for `ulysses`: `attend` sees whole sequences, some of the heads."""

    def __init__(self, attend: InnerAttention, context: ContextParallel):
        super().__init__()
        self._attend = attend
        self._group = context.group
        self._ranks = context.layout.degree

    def forward(self, q: Tensor, k: Tensor, v: Tensor, mask: Mask) -> tuple[Tensor, Tensor | None]:
        """See `InnerAttention`; for this rank's share of the sequence. Ranks share heads of keys
        and values where these are fewer; the log-sum-exp stays unknown."""
        copies = max(1, self._ranks // k.size(1))
        k, v = (x.repeat_interleave(copies, 1) if copies > 1 else x for x in (k, v))
        out, _ = self._attend(self._to_heads(q), self._to_heads(k), self._to_heads(v), mask)
        return self._to_sequence(out), None

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
