"""Cross entropy over the vocabulary, as a sum over targets, with z-loss and label smoothing.

The loss of a step is the sum over all its targets divided by their number, so the loss here is
un-normalised: `count` tells the number before the forward, `sum` computes the sum.

z-loss and smoothing are there to train better, not to be measured: evaluation is of the plain cross
entropy, and training logs it beside the loss.
"""

import torch.nn.functional as F
from torch import Tensor, nn

from torchtitan.config.schema import Loss as LossSection
from torchtitan.loss.chunked import ChunkedLoss
from torchtitan.loss.registry import LOSSES, loss_settings
from torchtitan.loss.settings import CrossEntropySettings
from torchtitan.loss.vocab_parallel import VocabParallelCrossEntropy
from torchtitan.models.batch import IGNORE_INDEX, Batch
from torchtitan.parallel.runner import Loss
from torchtitan.utils.dtypes import at_least_float32

_PLAIN = CrossEntropySettings()


class CrossEntropyLoss(ChunkedLoss):
    """Sum of the cross entropies of all targets, in nats, and of what the settings add."""

    Settings = CrossEntropySettings
    settings: CrossEntropySettings

    def __init__(
        self,
        settings: CrossEntropySettings = _PLAIN,
        num_chunks: int | None = 1,
        vocabulary: VocabParallelCrossEntropy | None = None,
    ):
        """See `ChunkedLoss`."""
        super().__init__(settings, num_chunks, vocabulary)
        if not settings.plain:
            self.terms = ("cross_entropy",)

    def sum(self, hidden: Tensor, head: nn.Module, batch: Batch) -> Tensor:
        """See `ChunkedLoss`. With one chunk `head(hidden)` gives logits `[B, T, V]`."""
        if self.num_chunks != 1 or self.vocabulary is not None or not self.settings.plain:
            return super().sum(hidden, head, batch)
        logits = head(hidden).flatten(0, -2)
        wide = logits.to(at_least_float32(logits.dtype))
        labels = batch["labels"].flatten()
        return F.cross_entropy(wide, labels, ignore_index=IGNORE_INDEX, reduction="sum")

    def chunk(self, logits: Tensor, labels: Tensor, train: bool) -> tuple[Tensor, Tensor | None]:
        """See `ChunkedLoss`; the gradient is written out, which saves memory and time."""
        dtype, vocabulary = at_least_float32(logits.dtype), self.vocabulary
        if vocabulary is None:
            losses, plain, grad = _cross_entropy(logits.to(dtype), labels, self.settings)
        elif vocabulary.gather:
            wide = vocabulary.whole(logits).to(dtype)
            losses, plain, grad = _cross_entropy(wide, labels, self.settings)
            grad = grad.narrow(1, vocabulary.first, logits.size(1))
        else:
            wide = logits.to(dtype)
            losses, plain, grad = vocabulary.cross_entropy(wide, labels, self.settings)
        no_target = labels == IGNORE_INDEX
        if not self.settings.plain:
            self.report("cross_entropy", plain.masked_fill_(no_target, 0).sum())
        return losses.masked_fill_(no_target, 0).sum(), grad


def build_losses(
    section: LossSection, num_chunks: int | None, vocabulary: VocabParallelCrossEntropy | None
) -> tuple[Loss, Loss]:
    """What is minimised, and what evaluation is of: the plain cross entropy, so that runs compare
    whatever they minimise, unless the loss has an `evaluation` of its own."""
    loss = LOSSES[section.name].load()(loss_settings(section), num_chunks, vocabulary)
    evaluation: Loss | None = getattr(loss, "evaluation", None)
    if evaluation is None:
        evaluation = CrossEntropyLoss(num_chunks=num_chunks, vocabulary=vocabulary)
    return loss, evaluation


def _cross_entropy(
    logits: Tensor, labels: Tensor, settings: CrossEntropySettings
) -> tuple[Tensor, Tensor, Tensor]:
    """The losses `[n]`, the plain cross entropies `[n]`, the gradient of the losses for `logits`
    `[n, V]`; for rows that have no target too."""
    z_loss_weight, smoothing = settings.z_loss_weight, settings.label_smoothing
    classes = labels.unsqueeze(1).clamp_min(0)
    log_probabilities = F.log_softmax(logits, -1)
    plain = losses = log_probabilities.gather(1, classes).squeeze(1).neg_()
    if smoothing:
        losses = (1 - smoothing) * plain - smoothing * log_probabilities.mean(-1)
    if z_loss_weight:
        # The largest logit less its own log probability: exact also where the target's is tiny.
        log_z = logits.amax(-1) - log_probabilities.amax(-1)
        losses = losses + z_loss_weight * log_z**2
    grad = log_probabilities.exp_()
    if z_loss_weight:
        grad.mul_((2 * z_loss_weight * log_z).add_(1).unsqueeze(1))
    grad.scatter_add_(1, classes, grad.new_full((), smoothing - 1).expand_as(classes))
    if smoothing:
        grad.sub_(smoothing / logits.size(1))
    return losses, plain, grad
