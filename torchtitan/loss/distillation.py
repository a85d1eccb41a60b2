"""Distillation: the divergence from a frozen teacher's distribution of each next token.

The teacher sees each batch first. With `top_k` its largest logits are recorded then; else its last
hidden states are, and its logits are computed with the loss, for one chunk of tokens at a time.
"""

import torch
import torch.nn.functional as F
from torch import Tensor, nn

from torchtitan.loss.chunked import ChunkedLoss
from torchtitan.loss.recording import Recording
from torchtitan.loss.registry import DistillationSettings
from torchtitan.loss.vocab_parallel import VocabShard
from torchtitan.models.batch import Batch
from torchtitan.utils.dtypes import at_least_float32

_HIDDEN, _LOGITS, _TOKENS = "teacher_hidden", "teacher_logits", "teacher_tokens"


class DistillationLoss(ChunkedLoss):
    """Sum over the targets of the divergence from the teacher, mixed with the cross entropy."""

    Settings = DistillationSettings
    settings: DistillationSettings
    terms = ("cross_entropy", "divergence")

    def __init__(
        self,
        settings: DistillationSettings,
        num_chunks: int | None = 1,
        shard: VocabShard | None = None,
    ):
        super().__init__(settings, num_chunks, shard)
        self._teacher: dict[str, Tensor] = {}
        self._teacher_head: Tensor | None = None

    def frozen_pass(self) -> "TeacherPass":
        """Return what to evaluate the teacher with."""
        return TeacherPass(self)

    def sum(self, hidden: Tensor, head: nn.Module, batch: Batch) -> Tensor:
        """Return the sum over the targets, a scalar; see `ChunkedLoss.sum`."""
        names = [_LOGITS, _TOKENS] if self.settings.top_k else [_HIDDEN]
        self._teacher = {name: batch[name].flatten(0, 1) for name in names}
        try:
            return super().sum(hidden, head, batch)
        finally:
            self._teacher = {}

    def token_losses(self, logits: Tensor, labels: Tensor) -> Tensor:
        """Return the losses `[n]`; see `ChunkedLoss.token_losses`."""
        temperature, weight = self.settings.temperature, self.settings.weight
        cross_entropy = F.cross_entropy(logits, labels, reduction="none")
        log_q = F.log_softmax(logits / temperature, -1)
        with torch.no_grad():
            of_teacher = self._teacher_logits().to(logits.dtype)
            log_p = F.log_softmax(of_teacher / temperature, -1)
        if self.settings.top_k:
            log_q = log_q.gather(1, self._teacher[_TOKENS][self.part])
        # The factor keeps the gradient's size as the temperature grows.
        divergence = temperature**2 * (log_p.exp() * (log_p - log_q)).sum(-1)
        self.report("cross_entropy", cross_entropy)
        self.report("divergence", divergence)
        return weight * divergence + (1 - weight) * cross_entropy

    def keep_head(self, weight: Tensor) -> None:
        """Keep the teacher's head for this step, if the logits are computed with the loss."""
        self._teacher_head = weight

    def gather_logits(self, hidden: Tensor, weight: Tensor) -> Tensor:
        """Return logits `[n, V]`, given hidden states and this rank's rows of a head."""
        logits = hidden @ weight.t()
        return logits if self.shard is None else self.shard.gather_logits(logits)

    def _teacher_logits(self) -> Tensor:
        """Return the teacher's logits of the chunk at hand: the recorded ones, or all `[n, V]`."""
        if self.settings.top_k:
            return self._teacher[_LOGITS][self.part]
        assert self._teacher_head is not None
        return self.gather_logits(self._teacher[_HIDDEN][self.part], self._teacher_head)


class TeacherPass(Recording):
    """Records what the loss needs of the teacher."""

    def __init__(self, loss: DistillationLoss):
        super().__init__()
        self._loss = loss
        self._has_head = False

    def sum(self, hidden: Tensor, head: nn.Module, batch: Batch) -> Tensor:
        """Record a microbatch; return zero."""
        top_k = self._loss.settings.top_k

        def consume(hidden: Tensor, weight: Tensor) -> Tensor:
            if top_k is None:
                self.record(_HIDDEN, hidden.detach())
                if not self._has_head:  # a copy: FSDP frees what it has gathered
                    self._loss.keep_head(weight.detach().clone())
                    self._has_head = True
            else:
                self._record_largest(hidden, weight, top_k)
            return hidden.new_zeros(())

        return head(hidden, consume)

    def _record_largest(self, hidden: Tensor, weight: Tensor, top_k: int) -> None:
        flat = hidden.flatten(0, -2)
        found = [
            self._loss.gather_logits(part, weight).topk(top_k, dim=-1)
            for part in flat.split(self._loss.chunk_size(len(flat)))
        ]
        shape = (*hidden.shape[:-1], top_k)
        values = torch.cat([part.values for part in found])
        self.record(_LOGITS, values.to(at_least_float32(values.dtype)).view(shape))
        self.record(_TOKENS, torch.cat([part.indices for part in found]).view(shape))
