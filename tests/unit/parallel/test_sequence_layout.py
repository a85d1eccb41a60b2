"""Which chunks of a sequence a rank holds, and which of them meet."""

from collections import Counter

import pytest
import torch

from torchtitan.parallel.context.ring_attention import visibility_levels
from torchtitan.parallel.context.sequence_layout import Block, SequenceLayout

LAYOUTS = [SequenceLayout(degree, balanced) for degree in (2, 3, 4) for balanced in (True, False)]


@pytest.mark.parametrize("layout", LAYOUTS)
def test_what_is_cut_can_be_joined(layout: SequenceLayout) -> None:
    whole = torch.arange(2 * 24 * 3).view(2, 24, 3)
    shares = [layout.select(whole, layout.chunks(rank)) for rank in range(layout.degree)]
    assert {share.shape for share in shares} == {(2, 24 // layout.degree, 3)}
    assert torch.equal(layout.join(shares), whole)


def test_headtail_holds_both_ends() -> None:
    layout = SequenceLayout(2, balanced=True)
    share = layout.select(torch.arange(8).view(1, 8), layout.chunks(0))
    assert share.tolist() == [[0, 1, 6, 7]]
    with pytest.raises(AssertionError, match="not checked"):
        layout.select(torch.arange(10).view(1, 10), (0,))


def pairs(layout: SequenceLayout, rank: int, blocks: tuple[Block, ...]) -> Counter[tuple[int, int]]:
    """What sees what: numbers of chunks, of queries and keys, counted over all calls."""
    own, found = layout.chunks(rank), Counter[tuple[int, int]]()
    for block in blocks:
        for call in block.calls:
            for i, query in enumerate(own[call.queries.start : call.queries.stop]):
                for j, key in enumerate(block.chunks[call.keys.start : call.keys.stop]):
                    if not call.causal or j <= i:
                        found[query, key] += 1
                    if call.causal:
                        assert (query == key) == (i == j)
    return found


@pytest.mark.parametrize("layout", LAYOUTS)
def test_every_query_meets_its_past_once(layout: SequenceLayout) -> None:
    expected = Counter((q, k) for q in range(layout.num_chunks) for k in range(q + 1))
    in_turn, at_once = Counter[tuple[int, int]](), Counter[tuple[int, int]]()
    costs = set()
    for rank in range(layout.degree):
        found = pairs(layout, rank, layout.blocks_in_turn(rank))
        costs.add(found.total())
        in_turn += found
        at_once += pairs(layout, rank, (layout.block_of_all(rank),))
    assert in_turn == at_once == expected
    assert (len(costs) == 1) == layout.balanced


@pytest.mark.parametrize("layout", LAYOUTS)
def test_levels_bound_what_is_visible(layout: SequenceLayout) -> None:
    """0 where no pair is in the same document, 2 where all are, in every sequence of the batch."""
    generator = torch.Generator().manual_seed(0)
    seen = set()
    packed = [torch.rand(2, 24, generator=generator) < p for p in (0.0, 0.02, 0.1, 0.5)]
    for starts in [*packed, torch.arange(24).repeat(2, 1) % 6 == 0]:
        ids = starts.cumsum(1)
        same = ids.unsqueeze(2) == ids.unsqueeze(1)  # [B, T, T]
        size = 24 // layout.num_chunks
        for rank in range(layout.degree):
            levels = visibility_levels(ids, layout, rank)
            for i, query in enumerate(layout.chunks(rank)):
                for key in range(layout.num_chunks):
                    rows, columns = (slice(n * size, (n + 1) * size) for n in (query, key))
                    block = same[:, rows, columns]
                    level = 2 if block.all() else 1 if block.any() else 0
                    assert levels[i, key] == level
                    seen.add(level)
    assert seen == {0, 1, 2}
