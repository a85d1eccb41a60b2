"""Weights between our names and order and those of Hugging Face, by a family's table.

RoPE turns neighbouring channels (0, 1), (2, 3), ... of a head, as in Meta's code. Most models of
Hugging Face pair channel i of a head's first half with channel i of its second half, so rows that
make such channels are stored in another order (`HFWeight.rope`). Families whose model there pairs
neighbours leave `rope` unset.
"""

from __future__ import annotations

import re
from collections.abc import Iterable, Mapping, Sequence
from typing import TYPE_CHECKING

from torchtitan.models.decoder.args import DecoderArgs
from torchtitan.models.spec import HFWeight

if TYPE_CHECKING:
    from torch import Tensor

_LAYER = re.compile(r"(?<=\.)\d+(?=\.)")


def hf_names(
    names: Iterable[str], table: Sequence[HFWeight], args: DecoderArgs
) -> dict[str, HFWeight]:
    """Return the table's row for each of our names, with the layer's number filled in.

    Tied weights count once, as the embedding. Raises ValueError for a parameter that has no row.
    """
    return _rows(names, {row.ours: row for row in table}, args)


def to_hf(
    weights: Mapping[str, Tensor], table: Sequence[HFWeight], args: DecoderArgs
) -> dict[str, Tensor]:
    """Return our whole weights under their names and in their order. Raises like `hf_names`."""
    size, rows = args.head_size(), hf_names(weights, table, args)
    return {
        row.theirs: _swap(weights[ours], size // 2, 2) if row.rope else weights[ours]
        for ours, row in rows.items()
    }


def from_hf(
    weights: Mapping[str, Tensor], table: Sequence[HFWeight], args: DecoderArgs
) -> dict[str, Tensor]:
    """Return their whole weights under our names and in our order. Raises like `hf_names`."""
    size, rows = args.head_size(), our_names(weights, table, args)
    return {
        row.ours: interleave_rope(weights[theirs], size) if row.rope else weights[theirs]
        for theirs, row in rows.items()
    }


def our_names(
    names: Iterable[str], table: Sequence[HFWeight], args: DecoderArgs
) -> dict[str, HFWeight]:
    """Return the table's row for each of their names; else like `hf_names`."""
    return _rows(names, {row.theirs: row for row in table}, args)


def interleave_rope(weight: Tensor, head_size: int) -> Tensor:
    """Return whole heads in our order of rows, from Hugging Face's: two halves of a head.

    `weight` is `[heads * hd, ...]`.
    """
    return _swap(weight, 2, head_size // 2)


def _rows(
    names: Iterable[str], by_name: Mapping[str, HFWeight], args: DecoderArgs
) -> dict[str, HFWeight]:
    if args.norm_type == "layernorm":
        raise ValueError("no model of Hugging Face's has layernorm without a bias")
    rows = {}
    for name in names:
        row = by_name.get(_LAYER.sub("{n}", name))
        if row is None:
            raise ValueError(f"the family's Hugging Face table has no row for {name}")
        if row.tied and args.tied_embeddings:
            continue
        layer = "".join(_LAYER.findall(name))
        ours, theirs = (side.replace("{n}", layer) for side in (row.ours, row.theirs))
        rows[name] = HFWeight(ours, theirs, row.rope, row.tied)
    return rows


def _swap(weight: Tensor, outer: int, inner: int) -> Tensor:
    """Reorder each head's rows from `[outer, inner]` to `[inner, outer]`.

    `weight` is `[heads * hd, D]`, or a bias or norm without D.
    """
    heads = weight.unflatten(0, (-1, outer, inner))
    return heads.transpose(1, 2).flatten(0, 2).contiguous()
