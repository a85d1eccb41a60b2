"""Log-probabilities of the targets, differentiable, with the logits of one chunk at a time.

A `ChunkedLoss` computes its gradients in the forward, because each token's loss stands alone. A
loss of whole documents knows the gradient of a token only after all tokens of its documents have
been added up, so here the backward computes the logits of each chunk again.
"""

from typing import Any

import torch
import torch.distributed as dist
from torch import Tensor
from torch.autograd.function import once_differentiable

from torchtitan.loss.chunked import HeadGradients
from torchtitan.loss.vocab_parallel import VocabShard
from torchtitan.models.batch import IGNORE_INDEX
from torchtitan.utils.dtypes import at_least_float32


def token_log_probs(
    hidden: Tensor,
    weight: Tensor,
    labels: Tensor,
    chunk_size: int,
    shard: VocabShard | None = None,
) -> Tensor:
    """Return the natural logarithms `[N]` of the targets' probabilities, 0 where there is none.

    `hidden` is `[N, D]`, `labels` is `[N]`. With `shard`, `weight` `[rows, D]` is this rank's part
    of the head; the result is the same on all its ranks, and each computes its part of the
    gradients. The result has at least float32.
    """
    result: Tensor = _TokenLogProbs.apply(hidden, weight, labels, chunk_size, shard)
    return result


class _TokenLogProbs(torch.autograd.Function):
    """See `token_log_probs`."""

    @staticmethod
    def forward(
        ctx: Any,
        hidden: Tensor,
        weight: Tensor,
        labels: Tensor,
        chunk_size: int,
        shard: VocabShard | None,
    ) -> Tensor:
        classes, elsewhere = _local_classes(labels, len(weight), shard)
        # log Z in two parts, the largest logit and the rest: exact where logits are large.
        largest, rest, of_target = hidden.new_empty(
            3, len(hidden), dtype=at_least_float32(hidden.dtype)
        ).unbind()
        for start in range(0, len(hidden), chunk_size):
            part = slice(start, start + chunk_size)
            logits = (hidden[part] @ weight.t()).to(largest.dtype)
            of_target[part] = logits.gather(1, classes[part].unsqueeze(1)).squeeze(1)
            largest[part] = logits.amax(-1)
            logits = logits.sub_(largest[part].unsqueeze(1)).exp_()
            rest[part] = logits.sum(-1).log_()
            del logits  # before the next chunk's are there
        if shard is not None:
            largest, rest, _ = shard.combine(largest, rest)
        log_probs = (of_target - largest).sub_(rest)
        if shard is not None:
            log_probs.masked_fill_(elsewhere, 0)
            dist.all_reduce(log_probs, group=shard.group)
        ctx.save_for_backward(hidden, weight, labels, largest, rest)
        ctx.chunk_size, ctx.shard = chunk_size, shard
        return log_probs.masked_fill_(labels == IGNORE_INDEX, 0)

    @staticmethod
    @once_differentiable
    def backward(ctx: Any, grad: Tensor) -> tuple[Tensor | None, ...]:
        hidden, weight, labels, largest, rest = ctx.saved_tensors
        classes, elsewhere = _local_classes(labels, len(weight), ctx.shard)
        no_target = labels == IGNORE_INDEX
        grad = grad.masked_fill(no_target, 0)
        at_target = grad.masked_fill(elsewhere, 0)
        gradients = HeadGradients(hidden, weight, no_target, ctx.needs_input_grad[:2])
        for start in range(0, len(hidden), ctx.chunk_size):
            part = slice(start, start + ctx.chunk_size)
            logits = (hidden[part] @ weight.t()).to(largest.dtype)
            logits.sub_(largest[part].unsqueeze(1)).sub_(rest[part].unsqueeze(1))
            grad_logits = logits.exp_().mul_(-grad[part].unsqueeze(1))
            grad_logits.scatter_add_(1, classes[part].unsqueeze(1), at_target[part].unsqueeze(1))
            gradients.add(part, grad_logits)
            del logits, grad_logits
        of_hidden, of_weight = gradients.finish()
        if of_weight is not None:
            of_weight = of_weight.to(weight.dtype)
        return of_hidden, of_weight, None, None, None


def _local_classes(labels: Tensor, rows: int, shard: VocabShard | None) -> tuple[Tensor, Tensor]:
    """Return the row of each label in this rank's part of the head, and where it has none."""
    classes = labels.clamp_min(0)
    if shard is not None:
        classes = classes - shard.first
    elsewhere = (classes < 0) | (classes >= rows)
    return classes.masked_fill(elsewhere, 0), elsewhere
