"""Cross entropy over the vocabulary, as a sum over targets, with z-loss and label smoothing.

The loss of a step is the sum over all its targets divided by their number, so the loss here is
un-normalised: `count` gives the number before the forward, `sum` computes the sum.

z-loss and smoothing help training and are not a measure of it: evaluation uses the plain cross
entropy, and training logs it beside the loss.
"""

import torch
import torch.distributed as dist
import torch.nn.functional as F
from torch import Tensor, nn

from torchtitan.config.schema import Loss as LossSection
from torchtitan.loss.chunked import ChunkedLoss
from torchtitan.loss.registry import LOSSES, CrossEntropySettings, loss_settings
from torchtitan.loss.vocab_parallel import VocabShard
from torchtitan.models.batch import IGNORE_INDEX, Batch
from torchtitan.parallel.runner import Loss
from torchtitan.utils.dtypes import at_least_float32

_PLAIN = CrossEntropySettings()


class CrossEntropyLoss(ChunkedLoss):
    """Sum of the cross entropies of all targets, in nats, and of the terms in the settings."""

    Settings = CrossEntropySettings
    settings: CrossEntropySettings

    def __init__(
        self,
        settings: CrossEntropySettings = _PLAIN,
        num_chunks: int | None = 1,
        shard: VocabShard | None = None,
    ):
        super().__init__(settings, num_chunks, shard)
        if not settings.plain:
            self.terms = ("cross_entropy",)

    def sum(self, hidden: Tensor, head: nn.Module, batch: Batch) -> Tensor:
        """Return the sum over the targets, a scalar; see `ChunkedLoss.sum`.

        The plain cross entropy in one chunk is left to PyTorch and autograd.
        """
        if self.num_chunks != 1 or self.shard is not None or not self.settings.plain:
            return super().sum(hidden, head, batch)
        logits = head(hidden).flatten(0, -2)  # [B * T, V]
        wide = logits.to(at_least_float32(logits.dtype))
        labels = batch["labels"].flatten()
        return F.cross_entropy(wide, labels, ignore_index=IGNORE_INDEX, reduction="sum")

    def chunk(self, logits: Tensor, labels: Tensor, train: bool) -> tuple[Tensor, Tensor | None]:
        """Return the sum over a chunk and its gradient, which saves memory and time over autograd.

        See `ChunkedLoss.chunk`.
        """
        wide, shard = logits, self.shard
        if shard is not None and shard.gather:
            wide, shard = shard.gather_logits(logits), None
        wide = wide.to(at_least_float32(logits.dtype))
        losses, plain, grad = cross_entropy(wide, labels, self.settings, shard)
        if grad.shape != logits.shape:  # gathered
            assert self.shard is not None
            grad = grad.narrow(1, self.shard.first, logits.size(1))
        no_target = labels == IGNORE_INDEX
        if not self.settings.plain:
            self.report("cross_entropy", plain.masked_fill_(no_target, 0).sum())
        return losses.masked_fill_(no_target, 0).sum(), grad


def build_losses(
    section: LossSection,
    num_chunks: int | None,
    shard: VocabShard | None,
    sequence_group: dist.ProcessGroup | None = None,
) -> tuple[Loss, Loss]:
    """Return the training loss and the evaluation loss.

    `sequence_group` are the ranks that each hold a share of every sequence, for a loss of whole
    documents.

    Evaluation uses the plain cross entropy, so that runs with different losses compare, unless the
    loss has an `evaluation` of its own.
    """
    loss = LOSSES[section.name].load()(loss_settings(section), num_chunks, shard)
    if hasattr(loss, "sequence_group"):
        loss.sequence_group = sequence_group
    evaluation: Loss | None = getattr(loss, "evaluation", None)
    if evaluation is None:
        evaluation = CrossEntropyLoss(num_chunks=num_chunks, shard=shard)
    return loss, evaluation


def cross_entropy(
    logits: Tensor,
    labels: Tensor,
    settings: CrossEntropySettings,
    shard: VocabShard | None = None,
) -> tuple[Tensor, Tensor, Tensor]:
    """Return losses `[n]`, plain cross entropies `[n]`, and the losses' gradient for the logits.

    With `shard`, `logits` `[n, rows]` are this rank's part of the vocabulary; the losses are the
    same on all ranks. `labels` `[n]` count in the whole vocabulary; rows without a target get
    values that the caller must ignore.
    """
    z_loss_weight, smoothing = settings.z_loss_weight, settings.label_smoothing
    size = logits.size(1) if shard is None else shard.total
    log_probs = F.log_softmax(logits, -1)
    if z_loss_weight or shard is not None:
        # log Z in two parts: exact also where the largest log probability is tiny.
        largest, rest = logits.amax(-1), log_probs.amax(-1).neg_()
    classes = labels.clamp_min(0)
    if shard is not None:
        classes = classes - shard.first
        elsewhere = (classes < 0) | (classes >= logits.size(1))
        classes = classes.masked_fill_(elsewhere, 0)
        largest, rest, correction = shard.combine(largest, rest)
    classes = classes.unsqueeze(1)

    of_target = log_probs.gather(1, classes).squeeze(1)
    sums = [log_probs.sum(-1)] if smoothing else []
    if shard is not None:
        of_target = (of_target + correction).masked_fill_(elsewhere, 0)
        sums = [total + logits.size(1) * correction for total in sums]
        of_target, *sums = _sum_over(shard.group, [of_target, *sums])
    plain = losses = of_target.neg_()
    if smoothing:
        losses = (1 - smoothing) * plain - smoothing * (sums[0] / size)
    if z_loss_weight:
        log_z = largest + rest
        losses = losses + z_loss_weight * log_z**2

    grad = log_probs.exp_()
    if shard is not None:
        grad.mul_(correction.exp().unsqueeze(1))
    if z_loss_weight:
        grad.mul_((2 * z_loss_weight * log_z).add_(1).unsqueeze(1))
    at_target = grad.new_full((), smoothing - 1).expand_as(classes)
    if shard is not None:
        at_target = at_target.masked_fill(elsewhere.unsqueeze(1), 0)
    grad.scatter_add_(1, classes, at_target)
    if smoothing:
        grad.sub_(smoothing / size)
    return losses, plain, grad


def _sum_over(group: dist.ProcessGroup, tensors: list[Tensor]) -> list[Tensor]:
    total = torch.stack(tensors)
    dist.all_reduce(total, group=group)
    return list(total.unbind())
