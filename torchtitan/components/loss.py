"""Cross entropy over the vocabulary, as a sum over targets.

The loss of a step is the sum over all its targets divided by their number, so the loss here is
un-normalised: `count` tells the number before the forward, `sum` computes the sum.

The logits of a microbatch, `[B * T, V]`, are often the largest tensor of all. In chunks of the
tokens only a part of them exists at a time: each chunk's gradient is computed along with its loss,
in the forward, after which its logits are gone. On a CPU this is faster too: it touches less fresh
memory, which costs page faults, and the backward does not pass over all logits again.
"""

from typing import Any

import torch
import torch.nn.functional as F
from torch import Tensor, nn
from torch.autograd.function import once_differentiable

from torchtitan.components.cut_vocabulary import CutVocabulary
from torchtitan.models.batch import IGNORE_INDEX, Batch
from torchtitan.utils.dtypes import at_least_float32


class CrossEntropyLoss:
    """Sum of the cross entropies of all targets; labels of `IGNORE_INDEX` are no targets."""

    def __init__(self, num_chunks: int = 1, vocabulary: CutVocabulary | None = None):
        """`num_chunks` is the number of parts that the tokens of a microbatch are worked on in.
        `vocabulary` tells which of the head's rows this rank has, where not all."""
        self.num_chunks = num_chunks
        self.vocabulary = vocabulary

    def count(self, batch: Batch) -> Tensor:
        """Number of targets, int64 scalar."""
        return (batch["labels"] != IGNORE_INDEX).sum()

    def sum(self, hidden: Tensor, head: nn.Module, batch: Batch) -> Tensor:
        """Sum over the targets, a scalar of float32 (of float64 for a float64 model), in nats.

        `hidden` is `[B, T, D]`; `head(hidden)` gives logits `[B, T, V]`, `head(hidden, consume)`
        calls `consume(hidden, weight)`.
        """
        labels = batch["labels"].flatten()
        if self.num_chunks == 1 and self.vocabulary is None:
            logits = head(hidden).flatten(0, -2)
            wide = logits.to(at_least_float32(logits.dtype))
            return F.cross_entropy(wide, labels, ignore_index=IGNORE_INDEX, reduction="sum")

        def consume(hidden: Tensor, weight: Tensor) -> Tensor:
            return _ChunkedCrossEntropy.apply(
                hidden.flatten(0, -2),
                weight,
                labels,
                self.num_chunks,
                self.vocabulary,
                torch.is_grad_enabled(),
            )

        return head(hidden, consume)


class _ChunkedCrossEntropy(torch.autograd.Function):
    """Sum of cross entropies of `hidden` `[N, D]` @ `weight` `[V, D]`^T against `labels` `[N]`.

    The gradients are those of the sum; the backward only scales them.
    """

    @staticmethod
    def forward(
        ctx: Any,
        hidden: Tensor,
        weight: Tensor,
        labels: Tensor,
        num_chunks: int,
        vocabulary: CutVocabulary | None,
        train: bool,
    ) -> Tensor:
        want_hidden, want_weight = (train and needed for needed in ctx.needs_input_grad[:2])
        dtype = at_least_float32(hidden.dtype)
        total = torch.zeros((), dtype=dtype, device=hidden.device)
        no_target = (labels == IGNORE_INDEX).unsqueeze(1)
        grad_hidden = torch.empty_like(hidden) if want_hidden else None
        grad_weight: Tensor | None = None
        for start in range(0, len(hidden), size := -(-len(hidden) // num_chunks)):
            part = slice(start, start + size)
            loss, grad_logits = _chunk(hidden[part] @ weight.t(), labels[part], dtype, vocabulary)
            total += loss
            # Rows without a target are zeroed at the narrow ends of the products, not at this one.
            if grad_hidden is not None:
                torch.mm(grad_logits, weight, out=grad_hidden[part])
            if want_weight:
                product = grad_logits.t() @ hidden[part].masked_fill(no_target[part], 0)
                # Kept wide, whatever the weight's type: it is a sum over all tokens.
                grad_weight = (
                    product.to(dtype) if grad_weight is None else grad_weight.add_(product)
                )
        if grad_hidden is not None:
            grad_hidden.masked_fill_(no_target, 0)
        ctx.save_for_backward(grad_hidden, grad_weight)
        ctx.weight_dtype = weight.dtype
        return total

    @staticmethod
    @once_differentiable
    def backward(ctx: Any, grad: Tensor) -> tuple[Tensor | None, ...]:
        grad_hidden, grad_weight = ctx.saved_tensors
        if grad_hidden is not None:
            grad_hidden = grad_hidden * grad
        if grad_weight is not None:
            grad_weight = (grad_weight * grad).to(ctx.weight_dtype)
        return grad_hidden, grad_weight, None, None, None, None


def _chunk(
    logits: Tensor, labels: Tensor, dtype: torch.dtype, vocabulary: CutVocabulary | None
) -> tuple[Tensor, Tensor]:
    """Summed cross entropy of `logits` `[n, V]`, computed in `dtype`, and its gradient for them.

    The gradient has the type of the logits; its rows without a target are not zeroed.
    """
    if vocabulary is None:
        loss, grad = _cross_entropy(logits.to(dtype), labels)
    elif vocabulary.gather:
        loss, grad = _cross_entropy(vocabulary.whole(logits).to(dtype), labels)
        grad = grad.narrow(1, vocabulary.first, logits.size(1))
    else:
        loss, grad = vocabulary.cross_entropy(logits.to(dtype), labels)
    return loss, grad.to(logits.dtype)


def _cross_entropy(logits: Tensor, labels: Tensor) -> tuple[Tensor, Tensor]:
    classes = labels.unsqueeze(1).clamp_min(0)
    log_probabilities = F.log_softmax(logits, -1)
    losses = log_probabilities.gather(1, classes).squeeze(1).neg_()
    grad = log_probabilities.exp_()
    grad.scatter_add_(1, classes, grad.new_full((), -1).expand_as(classes))
    return losses.masked_fill_(labels == IGNORE_INDEX, 0).sum(), grad
