"""Attention proper: softmax(q k^T / sqrt(hd)) v under a mask, by the kernel that suits the device.

`build_mask` is called once per forward, `Attend` in every layer. Without documents no mask exists:
PyTorch's scaled_dot_product_attention is told "causal" and uses its flash kernels. With documents
the mask is a boolean tensor on CPUs, and on CUDA a block mask for FlexAttention, which skips the
blocks that lie between documents. `Attend` is a module of its own so that another way of computing
the same (over several devices, say) can take its place.
"""

from __future__ import annotations

from typing import TYPE_CHECKING, Any, TypeAlias

import torch
import torch.nn.functional as F
from torch import Tensor, nn

if TYPE_CHECKING:
    from torch.nn.attention.flex_attention import BlockMask

Mask: TypeAlias = "Tensor | BlockMask | tuple[Tensor, ...] | None"
"""None is plain causal. A tuple is what a replacement of `Masks` tells one of `Attend`."""

_compiled: dict[str, Any] = {}


def build_mask(document_ids: Tensor | None) -> Mask:
    """The mask of a batch: a query sees the keys before it, and itself, in its own document.

    `document_ids` is int64 `[B, T]`; None means one document, plain causal attention, no mask.
    """
    if document_ids is None:
        return None
    if document_ids.is_cuda:
        return _block_mask(document_ids)
    same_document = document_ids.unsqueeze(-1) == document_ids.unsqueeze(-2)  # [B, T, T]
    return same_document.tril_().unsqueeze(1)  # [B, 1, T, T]


class Masks(nn.Module):
    """Builds the mask of a batch, once per forward; a module so that it can be replaced."""

    def forward(self, document_ids: Tensor | None) -> Mask:
        """See `build_mask`."""
        return build_mask(document_ids)


class Attend(nn.Module):
    """Causal attention of `q` over `k` and `v`, whose heads may be fewer (grouped queries)."""

    def forward(self, q: Tensor, k: Tensor, v: Tensor, mask: Mask) -> tuple[Tensor, Tensor | None]:
        """`q` `[B, H, T, hd]`, `k` and `v` `[B, Hkv, T, hd]`; returns `[B, H, T, hd]`, and the
        log-sum-exp of the scores `[B, H, T]` where the kernel gives it (here: None)."""
        grouped = False
        if q.size(1) != k.size(1):  # a branch: under compile, a comparison may stay a symbol
            grouped = True
        if mask is None or isinstance(mask, Tensor):
            out = F.scaled_dot_product_attention(
                q, k, v, attn_mask=mask, is_causal=mask is None, enable_gqa=grouped
            )
            return out, None
        return _compile_once("flex_attention")(q, k, v, block_mask=mask, enable_gqa=grouped), None


def _block_mask(document_ids: Tensor) -> BlockMask:
    num_sequences, seq_len = document_ids.shape

    def visible(batch: Tensor, _head: Tensor, query: Tensor, key: Tensor) -> Tensor:
        return (query >= key) & (document_ids[batch, query] == document_ids[batch, key])

    # Compiled, it does not build the [B, T, T] tensor that it summarises.
    create = _compile_once("create_block_mask")
    return create(visible, num_sequences, None, seq_len, seq_len, device=document_ids.device)


def _compile_once(name: str) -> Any:
    """FlexAttention's function `name`, which is only fast (and sparing of memory) when compiled."""
    from torch.nn.attention import flex_attention

    function = getattr(flex_attention, name)
    if torch.compiler.is_compiling():  # part of a compiled block already
        return function
    if name not in _compiled:
        _compiled[name] = torch.compile(function)
    return _compiled[name]
