"""The part of a sequence that each rank holds, and the parts that meet in causal attention.

A sequence is cut into equal chunks, numbered in order. Under causal attention a chunk sees itself
and all chunks before it, so the last one costs the most. With *head-tail* balancing there are two
chunks per rank, and rank r of n holds chunks r and 2n-1-r, one from each end: every rank then sees
the same number of keys. Since both of its chunks are in order, attention within one rank's share is
still plainly causal; of an earlier rank's share it sees the first half, and a later rank's share is
seen by its second half. No mask is needed anywhere.
"""

from collections.abc import Sequence
from dataclasses import dataclass

import torch
from torch import Tensor


@dataclass(frozen=True)
class Call:
    """Chunks of queries that see chunks of keys, by index among those that are at hand."""

    queries: range
    keys: range
    causal: bool
    """The queries see keys up to their own index; else all of them."""


@dataclass(frozen=True)
class Block:
    """Keys and values that are at hand at one time, and what they are used for."""

    chunks: tuple[int, ...]
    calls: tuple[Call, ...]


@dataclass(frozen=True)
class SequenceLayout:
    """A sequence over `degree` ranks; `balanced` is head-tail, else every rank has one chunk."""

    degree: int
    balanced: bool

    @property
    def num_chunks(self) -> int:
        """The sequence's length must be a multiple of this."""
        return self.degree * (2 if self.balanced else 1)

    def chunks(self, rank: int) -> tuple[int, ...]:
        """Return the chunks that `rank` holds, in order."""
        return (rank, self.num_chunks - 1 - rank) if self.balanced else (rank,)

    def select(self, tensor: Tensor, chunks: Sequence[int], dim: int = 1) -> Tensor:
        """Return these chunks of the whole sequence, which is dimension `dim` of `tensor`."""
        assert tensor.size(dim) % self.num_chunks == 0, "the length of the sequence was not checked"
        parts = tensor.chunk(self.num_chunks, dim)
        return torch.cat([parts[chunk] for chunk in chunks], dim)

    def join(self, shares: Sequence[Tensor], dim: int = 1) -> Tensor:
        """Return the whole sequence, given each rank's share."""
        pieces: dict[int, Tensor] = {}
        for rank, share in enumerate(shares):
            chunks = self.chunks(rank)
            pieces.update(zip(chunks, share.chunk(len(chunks), dim), strict=True))
        return torch.cat([pieces[chunk] for chunk in range(self.num_chunks)], dim)

    def blocks_in_turn(self, rank: int) -> tuple[Block, ...]:
        """Return `rank`'s blocks when shares arrive one by one: its own, the rank before's, ..."""
        own = self.chunks(rank)
        blocks = [Block(own, (Call(range(len(own)), range(len(own)), causal=True),))]
        for step in range(1, self.degree):
            others = self.chunks((rank - step) % self.degree)
            # Queries that see anything of the share, and keys that anything of ours sees.
            queries = range(sum(chunk < others[0] for chunk in own), len(own))
            keys = range(sum(chunk < own[-1] for chunk in others))
            blocks.append(Block(others, (Call(queries, keys, causal=False),) if queries else ()))
        return tuple(blocks)

    def block_of_all(self, rank: int) -> Block:
        """Return `rank`'s block when all chunks are at hand: each chunk's past, then itself."""
        calls = []
        for index, chunk in enumerate(self.chunks(rank)):
            queries = range(index, index + 1)
            if chunk > 0:
                calls.append(Call(queries, range(chunk), causal=False))
            calls.append(Call(queries, range(chunk, chunk + 1), causal=True))
        return Block(tuple(range(self.num_chunks)), tuple(calls))
