"""The embedding: the gradient of a token that occurs often is the sum over all its places."""

import pytest
import torch

from torchtitan.models.embedding import Embedding


def gradient(dtype: torch.dtype, tokens: torch.Tensor, upstream: torch.Tensor) -> torch.Tensor:
    embedding = Embedding(16, 4, dtype=dtype)
    embedding(tokens).backward(upstream.to(dtype))
    assert embedding.weight.grad is not None
    return embedding.weight.grad


@pytest.mark.parametrize("count", [256, 4096])
def test_many_equal_terms(count):
    found = gradient(torch.bfloat16, torch.full((2, count), 3), torch.ones(2, count, 4))
    assert found.dtype == torch.bfloat16
    assert (found[3] == 2 * count).all()
    assert found.count_nonzero() == 4


@pytest.mark.parametrize(
    ("dtype", "relative", "absolute"),
    [
        (torch.bfloat16, 2**-8, 1e-4),
        (torch.float32, 1e-5, 1e-4),
        (torch.float64, 1e-13, 1e-12),
    ],
)
def test_gradient_is_the_sum_rounded_once(dtype, relative, absolute):
    generator = torch.Generator().manual_seed(0)
    tokens = torch.randint(0, 16, (8, 512), generator=generator)
    upstream = torch.randn(8, 512, 4, generator=generator).to(dtype)
    exact = torch.zeros(16, 4, dtype=torch.float64)
    exact.index_add_(0, tokens.flatten(), upstream.flatten(0, 1).double())
    found = gradient(dtype, tokens, upstream)
    torch.testing.assert_close(found.double(), exact, rtol=relative, atol=absolute)


def test_looks_up_rows():
    embedding = Embedding(16, 4, dtype=torch.bfloat16)
    tokens = torch.tensor([[3, 0], [15, 3]])
    assert torch.equal(embedding(tokens), embedding.weight[tokens])
