"""Which keys a query sees, as functions of their places in the sequence.

FlexAttention makes its block masks of such functions; evaluated for all pairs they give a mask as a
tensor. A mask here is a function that takes what is known of a batch and returns the function of
pairs. That knows nothing of heads, since each rank may have other ones.
"""

from __future__ import annotations

from collections.abc import Callable, Sequence
from dataclasses import dataclass
from typing import TypeAlias

import torch
from torch import Tensor

MaskFunction: TypeAlias = Callable[[Tensor, Tensor, Tensor], Tensor]
"""`visible(batch, query, key)`: whether the token at index `query` of a sequence may see the one at
`key`. The arguments are integer tensors, the result is boolean; it is compiled."""


@dataclass(frozen=True)
class MaskInputs:
    """What a mask can be made of."""

    seq_len: int
    document_ids: Tensor | None
    """int64 `[B, T]`, of whole sequences."""
    window: int | None


def causal(inputs: MaskInputs) -> MaskFunction:
    """What comes before, and itself."""
    return lambda batch, query, key: query >= key


def document(inputs: MaskInputs) -> MaskFunction:
    """What is in the same document."""
    ids = inputs.document_ids
    assert ids is not None
    return lambda batch, query, key: ids[batch, query] == ids[batch, key]


def sliding_window(inputs: MaskInputs) -> MaskFunction:
    """The last `window` tokens, itself among them."""
    window = inputs.window
    assert window is not None
    return lambda batch, query, key: query - key < window


def all_of(functions: Sequence[MaskFunction]) -> MaskFunction:
    """What all of them let be seen."""

    def visible(batch: Tensor, query: Tensor, key: Tensor) -> Tensor:
        seen = functions[0](batch, query, key)
        for function in functions[1:]:
            seen = seen & function(batch, query, key)
        return seen

    return visible


def usual(inputs: MaskInputs) -> MaskFunction:
    """What a model's attention has without being told: of documents and window what there is."""
    functions = [causal(inputs)]
    if inputs.document_ids is not None:
        functions.append(document(inputs))
    if inputs.window is not None:
        functions.append(sliding_window(inputs))
    return all_of(functions)


def dense(visible: MaskFunction, inputs: MaskInputs, device: torch.device) -> Tensor:
    """Bool `[B, 1, T, T]`, or `[1, 1, T, T]` without documents."""
    places = torch.arange(inputs.seq_len, device=device)
    num_sequences = 1 if inputs.document_ids is None else inputs.document_ids.size(0)
    batch = torch.arange(num_sequences, device=device).view(-1, 1, 1, 1)
    return visible(batch, places.view(1, 1, -1, 1), places.view(1, 1, 1, -1))
