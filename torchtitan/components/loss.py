"""Cross entropy over the vocabulary, as a sum over targets.

The loss of a step is the sum over all its targets divided by their number, so the loss here is
un-normalised: `count` tells the number before the forward, `sum` computes the sum. The logits of a
microbatch, `[B * T, V]`, are often the largest tensor of all. In chunks of the tokens only a part of
them exists at a time: each chunk's gradient is computed along with its loss, in the forward, after
which its logits are gone. On a CPU this is faster as well, as a chunk is closer to fitting its caches.
"""

from typing import Any

import torch
import torch.nn.functional as F
from torch import Tensor, nn
from torch.autograd.function import once_differentiable

from torchtitan.models.batch import IGNORE_INDEX, Batch


class CrossEntropyLoss:
    """Sum of the cross entropies of all targets; labels of `IGNORE_INDEX` are no targets."""

    def __init__(self, num_chunks: int = 1):
        """`num_chunks` is the number of parts that the tokens of a microbatch are worked on in."""
        self.num_chunks = num_chunks

    def count(self, batch: Batch) -> Tensor:
        """Number of targets, int64 scalar."""
        return (batch["labels"] != IGNORE_INDEX).sum()

    def sum(self, hidden: Tensor, head: nn.Module, batch: Batch) -> Tensor:
        """Sum over the targets, a scalar of float32 (of float64 for a float64 model), in nats.

        `hidden` is `[B, T, D]`; `head(hidden)` gives logits, `head(hidden, consume)` lends its weight.
        """
        labels = batch["labels"].flatten()
        if self.num_chunks == 1:
            logits = head(hidden).flatten(0, -2)
            wide = logits.to(_at_least_float32(logits.dtype))
            return F.cross_entropy(wide, labels, ignore_index=IGNORE_INDEX, reduction="sum")

        def consume(hidden: Tensor, weight: Tensor) -> Tensor:
            return _ChunkedCrossEntropy.apply(
                hidden.flatten(0, -2), weight, labels, self.num_chunks, torch.is_grad_enabled()
            )

        return head(hidden, consume)


class _ChunkedCrossEntropy(torch.autograd.Function):
    """Sum of cross entropies of `hidden` `[N, D]` times `weight` `[V, D]` against `labels` `[N]`."""

    @staticmethod
    def forward(
        ctx: Any, hidden: Tensor, weight: Tensor, labels: Tensor, num_chunks: int, train: bool
    ) -> Tensor:
        dtype = _at_least_float32(hidden.dtype)
        total = torch.zeros((), dtype=dtype, device=hidden.device)
        want_hidden, want_weight = (train and needed for needed in ctx.needs_input_grad[:2])
        grad_hidden = torch.empty_like(hidden) if want_hidden else None
        # Summed over chunks, so kept wide, whatever the weight's type.
        grad_weight = torch.zeros_like(weight, dtype=dtype) if want_weight else None
        size = -(-len(hidden) // num_chunks)
        for start in range(0, len(hidden), size):
            part = slice(start, start + size)
            rows, targets = hidden[part], labels[part]
            logits = (rows @ weight.t()).to(dtype)
            if grad_hidden is None and grad_weight is None:
                total += F.cross_entropy(
                    logits, targets, ignore_index=IGNORE_INDEX, reduction="sum"
                )
                continue
            chunk_loss, grad_logits = _loss_and_grad(logits, targets)
            total += chunk_loss
            grad_logits = grad_logits.to(hidden.dtype)
            if grad_hidden is not None:
                torch.mm(grad_logits, weight, out=grad_hidden[part])
            if grad_weight is not None:
                grad_weight += grad_logits.t() @ rows
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
            grad_weight = grad_weight.mul_(grad).to(ctx.weight_dtype)
        return grad_hidden, grad_weight, None, None, None


def _loss_and_grad(logits: Tensor, labels: Tensor) -> tuple[Tensor, Tensor]:
    """Summed cross entropy, and its gradient for `logits` `[n, V]`, which are overwritten."""
    is_target = (labels != IGNORE_INDEX).unsqueeze(1)
    classes = labels.unsqueeze(1).clamp_min(0)
    log_probabilities = F.log_softmax(logits, -1)
    loss = -(log_probabilities.gather(1, classes) * is_target).sum()
    grad = log_probabilities.exp_()
    grad.scatter_add_(1, classes, torch.full_like(classes, -1, dtype=grad.dtype))
    return loss, grad.mul_(is_target)


def _at_least_float32(dtype: torch.dtype) -> torch.dtype:
    return torch.float64 if dtype == torch.float64 else torch.float32
