"""Attention proper: softmax(q k^T / sqrt(hd)) v under a mask, by the kernel that suits the device.

`AttentionMaskBuilder` is called once per forward, `InnerAttention` in every layer. Causal attention
needs no mask: PyTorch's scaled_dot_product_attention has a flag for it and flash kernels. On CPUs
documents are attended to one by one, and a window is a boolean tensor; on CUDA the mask is a
FlexAttention block mask, which skips blocks no query sees. Both are modules so that another
implementation (over several devices, for example) can replace them.
"""

from __future__ import annotations

from collections.abc import Callable
from typing import TYPE_CHECKING, Any, TypeAlias

import torch
import torch.nn.functional as F
from torch import Tensor, nn

from torchtitan.models.document_attention import document_attention
from torchtitan.models.masks import MaskFunction, MaskInputs, default_mask, dense

if TYPE_CHECKING:
    from torch.nn.attention.flex_attention import BlockMask

Mask: TypeAlias = "Tensor | BlockMask | tuple[Any, ...] | None"
"""None is plainly causal. A bool tensor is true where a query sees a key; int64 `[B, T]` are
document ids. A replacement of `AttentionMaskBuilder` may pass a tuple to its own replacement of
`InnerAttention`."""

_compiled: dict[str, Any] = {}


class AttentionMaskBuilder(nn.Module):
    """Build the mask of a batch, once per forward.

    A query sees itself and the keys before it in its own document, at most the last `window` of
    them including itself. "Before" is by index in the sequence, whatever the positions are.
    """

    def __init__(self, window: int | None = None):
        super().__init__()
        self.window = window

    def forward(self, document_ids: Tensor | None, positions: Tensor) -> Mask:
        """Return the mask for int64 `[B, T]` tensors; without ids there is one document."""
        return self.build(document_ids, positions.size(1), positions.device)

    def build(self, document_ids: Tensor | None, seq_len: int, device: torch.device) -> Mask:
        """Return the mask of whole sequences of `seq_len` tokens."""
        window = effective_window(self.window, seq_len)
        if document_ids is None and window is None:
            return None
        if window is None and device.type == "cpu":
            return document_ids
        inputs = MaskInputs(seq_len, document_ids, window)
        return build_mask(default_mask(inputs), inputs, device)


class InnerAttention(nn.Module):
    """Causal attention of `q` over `k` and `v`, whose heads may be fewer (grouped queries)."""

    def forward(self, q: Tensor, k: Tensor, v: Tensor, mask: Mask) -> Tensor:
        """Attend: `q` `[B, H, T, hd]`, `k` and `v` `[B, G, T, hd]` give `[B, H, T, hd]`."""
        grouped = False
        if q.size(1) != k.size(1):  # a branch: under compile, a comparison may stay a symbol
            grouped = True
        if isinstance(mask, Tensor) and mask.dtype == torch.int64:
            return document_attention(q, k, v, mask)[0]
        if mask is None or isinstance(mask, Tensor):
            return F.scaled_dot_product_attention(
                q, k, v, attn_mask=mask, is_causal=mask is None, enable_gqa=grouped
            )
        flex_attention: Callable[..., Tensor] = _compile_once("flex_attention")
        return flex_attention(q, k, v, block_mask=mask, enable_gqa=grouped)


def effective_window(window: int | None, seq_len: int) -> int | None:
    """Return the window, or None if it covers the whole sequence."""
    return None if window is None or window >= seq_len else window


def build_mask(visible: MaskFunction, inputs: MaskInputs, device: torch.device) -> Mask:
    """Return FlexAttention's mask on CUDA devices, else a bool tensor."""
    return (block_mask if device.type == "cuda" else dense)(visible, inputs, device)


def block_mask(visible: MaskFunction, inputs: MaskInputs, device: torch.device) -> BlockMask:
    """Return FlexAttention's mask. Without documents, all sequences of a batch share one."""

    def of_any_head(batch: Tensor, _head: Tensor, query: Tensor, key: Tensor) -> Tensor:
        return visible(batch, query, key)

    num_sequences = None if inputs.document_ids is None else inputs.document_ids.size(0)
    # Compiled, it does not build the [B, T, T] tensor that it summarises.
    create: Callable[..., BlockMask] = _compile_once("create_block_mask")
    seq_len = inputs.seq_len
    return create(of_any_head, num_sequences, None, seq_len, seq_len, device=device)


def _compile_once(name: str) -> Any:
    """Return FlexAttention's function `name` compiled, without which it is slow and large."""
    from torch.nn.attention import flex_attention

    function = getattr(flex_attention, name)
    if torch.compiler.is_compiling():  # part of a compiled block already
        return function
    if name not in _compiled:
        _compiled[name] = torch.compile(function)
    return _compiled[name]
