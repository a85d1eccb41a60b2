"""Causal attention within the documents of packed sequences, on CPUs.

A mask over all pairs of a sequence costs as much as attention over all of them, seen or not: packed
documents of a quarter of a sequence would take four times what they need. So each document is a
call of torch's kernel without a mask. On CUDA FlexAttention skips what nobody sees.

This is a custom operator: the compiler does not look into it, activation checkpointing can keep its
results, and fake tensors, which have no documents, pass through it.
"""

from collections.abc import Iterator
from itertools import pairwise
from typing import Any

import torch
from torch import Tensor, library

from torchtitan.utils.dtypes import at_least_float32

_ATEN = torch.ops.aten


@library.custom_op("torchtitan::document_attention", mutates_args=())
def document_attention(
    q: Tensor, k: Tensor, v: Tensor, document_ids: Tensor
) -> tuple[Tensor, Tensor]:
    """Return the output `[B, H, T, hd]` and the log-sum-exp `[B, H, T]` of CPU tensors.

    `q` is `[B, H, T, hd]`, `k` and `v` are `[B, G, T, hd]` where G divides H; `document_ids` is
    int64 `[B, T]`, equal within a document, whose tokens are adjacent. The log-sum-exp has no
    gradient.
    """
    out = torch.empty_like(q)
    lse = torch.empty(q.shape[:-1], dtype=at_least_float32(q.dtype))
    for row, tokens in _documents(document_ids):
        part = (x[row, :, tokens] for x in (q, k, v))
        of_part = _ATEN._scaled_dot_product_flash_attention_for_cpu(*part, 0.0, True)
        out[row, :, tokens], lse[row, :, tokens] = of_part
    return out, lse


@library.custom_op("torchtitan::document_attention_backward", mutates_args=())
def _document_attention_backward(
    grad: Tensor, q: Tensor, k: Tensor, v: Tensor, out: Tensor, lse: Tensor, document_ids: Tensor
) -> tuple[Tensor, Tensor, Tensor]:
    gradients = tuple(map(torch.empty_like, (q, k, v)))
    for row, tokens in _documents(document_ids):
        part = (x[row, :, tokens] for x in (grad, q, k, v, out, lse))
        found = _ATEN._scaled_dot_product_flash_attention_for_cpu_backward(*part, 0.0, True)
        for gradient, of_part in zip(gradients, found):
            gradient[row, :, tokens] = of_part
    return gradients  # type: ignore[return-value]


def _documents(document_ids: Tensor) -> Iterator[tuple[slice, slice]]:
    """Yield each document's sequence and tokens."""
    length = document_ids.size(1)
    begins = document_ids[:, 1:] != document_ids[:, :-1]
    for row, starts in enumerate(begins.unbind()):
        borders = [0, *(starts.nonzero().flatten() + 1).tolist(), length]
        for start, end in pairwise(borders):
            yield slice(row, row + 1), slice(start, end)


@document_attention.register_fake
def _(q: Tensor, k: Tensor, v: Tensor, document_ids: Tensor) -> tuple[Tensor, Tensor]:
    lse = torch.empty(q.shape[:-1], dtype=at_least_float32(q.dtype), device=q.device)
    return torch.empty_like(q), lse


@_document_attention_backward.register_fake
def _(grad: Tensor, q: Tensor, k: Tensor, v: Tensor, *_: Tensor) -> tuple[Tensor, Tensor, Tensor]:
    return torch.empty_like(q), torch.empty_like(k), torch.empty_like(v)


def _save(ctx: Any, inputs: tuple[Tensor, ...], output: tuple[Tensor, Tensor]) -> None:
    q, k, v, document_ids = inputs
    ctx.save_for_backward(q, k, v, *output, document_ids)
    ctx.mark_non_differentiable(output[1])


def _backward(ctx: Any, grad: Tensor, _: Tensor) -> tuple[Tensor | None, ...]:
    return *_document_attention_backward(grad, *ctx.saved_tensors), None


document_attention.register_autograd(_backward, setup_context=_save)
