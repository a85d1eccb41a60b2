"""RMSNorm: the hand-written backward is that of PyTorch's own function."""

import pytest
import torch
import torch.nn.functional as F

from torchtitan.models.norms import rms_norm


def inputs(dtype: torch.dtype) -> tuple[torch.Tensor, torch.Tensor, torch.Tensor]:
    generator = torch.Generator().manual_seed(0)
    x = torch.randn(3, 5, 32, generator=generator, dtype=torch.float64)
    weight = torch.randn(32, generator=generator, dtype=torch.float64)
    upstream = torch.randn(3, 5, 32, generator=generator, dtype=torch.float64)
    return (
        x.to(dtype).requires_grad_(),
        weight.to(dtype).requires_grad_(),
        upstream.to(dtype),
    )


def test_float64_is_the_derivative():
    x, weight, _ = inputs(torch.float64)
    assert torch.autograd.gradcheck(lambda x, w: rms_norm(x, w, 1e-2), (x, weight))


@pytest.mark.parametrize(
    ("dtype", "tolerance"), [(torch.float32, 1e-6), (torch.bfloat16, 2**-8), (torch.float64, 1e-14)]
)
def test_equals_the_exact_result_rounded_once(dtype, tolerance):
    x, weight, upstream = inputs(dtype)
    out = rms_norm(x, weight, 1e-5)
    gradients = torch.autograd.grad(out, (x, weight), upstream)
    wide_x, wide_weight = (t.detach().double().requires_grad_() for t in (x, weight))
    exact = F.rms_norm(wide_x, (32,), wide_weight, 1e-5)
    exact_gradients = torch.autograd.grad(exact, (wide_x, wide_weight), upstream.double())
    assert out.dtype == dtype
    for ours, reference in zip((out, *gradients), (exact, *exact_gradients)):
        assert ours.dtype == dtype
        error = (ours.double() - reference).abs().max() / reference.abs().max()
        assert error < tolerance
    if dtype == torch.bfloat16:  # unless the exact result lies on the edge between two
        assert (out != exact.to(dtype)).float().mean() < 0.02


def test_the_input_is_left_alone_and_needs_no_layout():
    x, weight, upstream = inputs(torch.float32)
    kept, given = x.detach().clone(), upstream.clone()
    flipped = x.transpose(0, 1)
    rms_norm(flipped, weight, 1e-5).backward(upstream.transpose(0, 1))
    assert torch.equal(x, kept) and torch.equal(upstream, given)
    gradient = x.grad.clone()
    x.grad = None
    rms_norm(x, weight, 1e-5).backward(upstream)
    torch.testing.assert_close(x.grad, gradient)
