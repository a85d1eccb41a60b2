"""Masks: which keys a query sees, as functions of indices in the sequence.

FlexAttention builds block masks from such functions; `dense` evaluates one for all pairs. A mask is
a function that takes `MaskInputs` and returns a `MaskFunction`. Heads are not among the arguments,
because tensor and context parallelism give each rank different ones.
"""

from __future__ import annotations

from collections.abc import Callable, Sequence
from dataclasses import dataclass
from typing import TypeAlias

import torch
from torch import Tensor

MaskFunction: TypeAlias = Callable[[Tensor, Tensor, Tensor], Tensor]
"""`visible(batch, query, key)` is true where a sequence's token at index `query` may see the one at
`key`. Arguments are integer tensors, the result is boolean; it is compiled."""


@dataclass(frozen=True)
class MaskInputs:
    """The facts about a batch that a mask may use."""

    seq_len: int
    document_ids: Tensor | None
    """int64 `[B, T]`, of whole sequences."""
    window: int | None


def causal(inputs: MaskInputs) -> MaskFunction:
    """Let a token see itself and all before it."""
    return lambda batch, query, key: query >= key


def document(inputs: MaskInputs) -> MaskFunction:
    """Let a token see its own document."""
    ids = inputs.document_ids
    assert ids is not None
    return lambda batch, query, key: ids[batch, query] == ids[batch, key]


def sliding_window(inputs: MaskInputs) -> MaskFunction:
    """Let a token see the last `window` tokens, itself included."""
    window = inputs.window
    assert window is not None
    return lambda batch, query, key: query - key < window


def all_of(functions: Sequence[MaskFunction]) -> MaskFunction:
    """Let a token see what all functions let it see."""

    def visible(batch: Tensor, query: Tensor, key: Tensor) -> Tensor:
        seen = functions[0](batch, query, key)
        for function in functions[1:]:
            seen = seen & function(batch, query, key)
        return seen

    return visible


def default_mask(inputs: MaskInputs) -> MaskFunction:
    """Return the mask of models: causal, within documents and the window if there are any."""
    functions = [causal(inputs)]
    if inputs.document_ids is not None:
        functions.append(document(inputs))
    if inputs.window is not None:
        functions.append(sliding_window(inputs))
    return all_of(functions)


def dense(visible: MaskFunction, inputs: MaskInputs, device: torch.device) -> Tensor:
    """Return the mask as a bool tensor `[B, 1, T, T]`, or `[1, 1, T, T]` without documents."""
    places = torch.arange(inputs.seq_len, device=device)
    num_sequences = 1 if inputs.document_ids is None else inputs.document_ids.size(0)
    batch = torch.arange(num_sequences, device=device).view(-1, 1, 1, 1)
    return visible(batch, places.view(1, 1, -1, 1), places.view(1, 1, 1, -1))
