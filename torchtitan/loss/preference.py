"""Preference losses over pairs of a chosen and a rejected answer: DPO, IPO, SimPO.

A row of a batch holds whole pairs: documents 2k and 2k + 1 are a pair, the chosen answer first,
each behind the same prompt, which has no targets. Documents without targets at the end of a row are
padding. The loss needs the log-probability of each answer: token log-probabilities, summed over
each document, and, where context parallelism cuts documents, over its ranks.

The reference is a frozen model that sees each batch before the one in training does. `frozen_pass`
gives what records the sums there, and the fields that it adds to the batches.
"""

from typing import Any, NamedTuple

import torch
import torch.distributed as dist
import torch.nn.functional as F
from torch import Tensor, nn
from torch.autograd.function import once_differentiable

from torchtitan.loss.chunked import chunk_size
from torchtitan.loss.recording import Recording
from torchtitan.loss.registry import DPOSettings
from torchtitan.loss.token_log_probs import token_log_probs
from torchtitan.loss.vocab_parallel import VocabShard
from torchtitan.models.batch import IGNORE_INDEX, Batch

_REFERENCE = "reference_log_probs"


class _SumOverRanks(torch.autograd.Function):
    """The sum of all ranks' tensors; the gradient is the sum of all ranks' gradients."""

    @staticmethod
    def forward(ctx: Any, tensor: Tensor, group: dist.ProcessGroup) -> Tensor:
        ctx.group = group
        total = tensor.clone()
        dist.all_reduce(total, group=group)
        return total

    @staticmethod
    @once_differentiable
    def backward(ctx: Any, grad: Tensor) -> tuple[Tensor, None]:
        total = grad.contiguous().clone()
        dist.all_reduce(total, group=ctx.group)
        return total, None


class Answers(NamedTuple):
    """The answers of a microbatch's pairs, `[B, pairs, 2]`: chosen, rejected."""

    log_probs: Tensor
    """Sums over the answers' targets."""
    lengths: Tensor
    """Numbers of targets."""

    @property
    def is_pair(self) -> Tensor:
        """True `[B, pairs]` where both answers have targets."""
        return (self.lengths > 0).all(-1)


class DPOLoss:
    """Sum over pairs of the loss of Direct Preference Optimization, or of one of its variants."""

    Settings = DPOSettings
    supports_vocab_parallel = True
    reads_pairs = True
    has_perplexity = False
    terms = ("rewards/chosen", "rewards/rejected", "rewards/margins", "rewards/accuracies")

    sequence_group: dist.ProcessGroup | None = None
    """The ranks that each hold a share of every sequence; None without context parallelism."""

    def __init__(
        self,
        settings: DPOSettings,
        num_chunks: int | None = 1,
        shard: VocabShard | None = None,
    ):
        """Create the loss; see `ChunkedLoss`."""
        self.settings = settings
        self.num_chunks = num_chunks
        self.shard = shard
        self._sums: dict[str, Tensor] = {}

    @property
    def evaluation(self) -> "DPOLoss":
        """The loss to validate with: the same."""
        return self

    def count(self, batch: Batch) -> Tensor:
        """Return the number of pairs, an int64 scalar."""
        is_target = batch["labels"] != IGNORE_INDEX
        lengths = _sums_of_documents(is_target.long(), batch["document_ids"], is_target.size(1))
        return (lengths > 0).all(-1).sum()

    def sum(self, hidden: Tensor, head: nn.Module, batch: Batch) -> Tensor:
        """Return the sum over the pairs, a scalar; see `ChunkedLoss.sum`.

        Each of the ranks of a sequence returns its share of the sum, which it has whole.
        """
        answers = self.answers(hidden, head, batch)
        settings, lengths = self.settings, answers.lengths.clamp_min(1)
        scores = answers.log_probs
        if settings.needs_reference:
            scores = scores - batch[_REFERENCE]
        averages = scores / lengths
        losses = _losses(averages if settings.averages else scores, settings)
        rewards = settings.beta * (averages if settings.variant == "simpo" else scores)
        is_pair, share = answers.is_pair, 1 / self._num_shares
        self._report(rewards.detach().masked_fill(~is_pair.unsqueeze(-1), 0) * share, share)
        return losses.masked_fill(~is_pair, 0).sum() * share

    def answers(self, hidden: Tensor, head: nn.Module, batch: Batch) -> Answers:
        """Return the answers in a microbatch, on all ranks of its sequences alike."""
        labels = batch["labels"]

        def consume(hidden: Tensor, weight: Tensor) -> Tensor:
            size = chunk_size(labels.numel(), self.num_chunks)
            return token_log_probs(
                hidden.flatten(0, -2), weight, labels.flatten(), size, self.shard
            )

        log_probs = head(hidden, consume).view_as(labels)
        per_token = torch.stack([log_probs, (labels != IGNORE_INDEX).to(log_probs.dtype)])
        whole = batch["document_ids"]
        documents = batch.get("token_document_ids", whole).expand_as(per_token)
        sums = _sums_of_documents(per_token.flatten(0, 1), documents.flatten(0, 1), whole.size(1))
        if self.sequence_group is not None:
            sums = _SumOverRanks.apply(sums, self.sequence_group)
        return Answers(*sums.unflatten(0, (2, -1)).unbind())

    def frozen_pass(self) -> "ReferencePass | None":
        """Return what to evaluate the reference with; None if there is no reference."""
        return ReferencePass(self) if self.settings.needs_reference else None

    def take_terms(self) -> dict[str, Tensor]:
        """Return and forget the sums over pairs since the last call."""
        sums, self._sums = self._sums, {}
        return sums

    @property
    def _num_shares(self) -> int:
        return 1 if self.sequence_group is None else self.sequence_group.size()

    def _report(self, rewards: Tensor, share: float) -> None:
        """Add `rewards` `[B, pairs, 2]`, of which this rank counts a `share`, to the terms."""
        chosen, rejected = rewards.unbind(-1)
        preferred = (chosen > rejected) * share
        values = (chosen, rejected, chosen - rejected, preferred)
        for name, value in zip(self.terms, values, strict=True):
            total = value.sum()
            self._sums[name] = self._sums[name] + total if name in self._sums else total


class ReferencePass(Recording):
    """Records the reference's log-probabilities of answers."""

    def __init__(self, loss: DPOLoss):
        super().__init__()
        self._loss = loss

    def sum(self, hidden: Tensor, head: nn.Module, batch: Batch) -> Tensor:
        """Record a microbatch; return zero."""
        self.record(_REFERENCE, self._loss.answers(hidden, head, batch).log_probs)
        return hidden.new_zeros(())


def _sums_of_documents(values: Tensor, documents: Tensor, length: int) -> Tensor:
    """Return the sums of `values` `[B, T]` over each document, `[B, pairs, 2]`.

    `length` is that of the whole sequence, which has no more documents than tokens.
    """
    size = length + length % 2
    rows = torch.arange(len(values), device=values.device).unsqueeze(1) * size
    sums = values.new_zeros(len(values) * size)
    # In one dimension, where CUDA has a deterministic algorithm.
    sums = sums.scatter_add(0, (rows + documents).flatten(), values.flatten())
    return sums.view(len(values), -1, 2)


def _losses(scores: Tensor, settings: DPOSettings) -> Tensor:
    """Return the losses `[B, pairs]`, given the scores `[B, pairs, 2]` of the answers."""
    difference = scores[..., 0] - scores[..., 1]
    beta, smoothing = settings.beta, settings.label_smoothing
    if settings.variant == "ipo":
        return (difference - 1 / (2 * beta)).square()
    margin = beta * difference - settings.margin
    preferred, reversed_ = F.logsigmoid(margin), F.logsigmoid(-margin)
    if settings.variant == "robust":
        return (smoothing * reversed_ - (1 - smoothing) * preferred) / (1 - 2 * smoothing)
    return -(1 - smoothing) * preferred - smoothing * reversed_
