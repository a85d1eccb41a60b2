"""Blocks that differ are compiled apart, however many there are."""

from collections.abc import Iterator

import pytest
import torch
from torch import Tensor, nn

from torchtitan.parallel.compile import apply_compile, mark_for_compile

NUM_BLOCKS = 10
"""More than torch compiles one function for by itself."""


class Block(nn.Module):
    def __init__(self) -> None:
        super().__init__()
        self.linear = nn.Linear(4, 4)

    def forward(self, x: Tensor) -> Tensor:
        return x + self.linear(x)


@pytest.fixture
def torchs_limits() -> Iterator[None]:
    torch._dynamo.reset()
    with torch._dynamo.config.patch(recompile_limit=8, accumulated_recompile_limit=256):
        yield


@pytest.mark.usefixtures("torchs_limits")
def test_blocks_of_many_classes() -> None:
    """Forwards with and without a backward are compiled apart, too."""
    blocks = {str(n): type(f"Block{n}", (Block,), {})() for n in range(NUM_BLOCKS)}
    plain = [lambda x, block=block: type(block).forward(block, x) for block in blocks.values()]
    for block in blocks.values():
        mark_for_compile(block, "eager")
    apply_compile(blocks)
    for is_trained in (True, False):
        x = torch.ones(2, 4, requires_grad=is_trained)
        with torch.set_grad_enabled(is_trained):
            for block, forward in zip(blocks.values(), plain, strict=True):
                assert torch.equal(block(x), forward(x))
