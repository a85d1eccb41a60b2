"""The kernels of attention agree, and parts of the keys merge to the whole."""

import pytest
import torch
from torch import Tensor
from torch._subclasses.fake_tensor import FakeTensorMode

from torchtitan.parallel.context import attention_kernels as kernels
from torchtitan.parallel.context.attention_kernels import (
    CPU,
    CUDA_FLASH,
    FORMULA,
    Part,
    choose_kernel,
)

CLOSE = {"rtol": 0, "atol": 1e-13}


def make(visible: str, heads: int, keys: int = 12, dtype: torch.dtype = torch.float64) -> Part:
    """Queries that see all keys, those up to their own, or some; query 2 then sees none."""
    generator = torch.Generator().manual_seed(0)
    q, k, v = (
        torch.randn(2, length, n, 8, generator=generator, dtype=torch.float64).to(dtype)
        for length, n in ((12, 4), (keys, heads), (keys, heads))
    )
    mask = torch.rand(2, 1, 12, keys, generator=generator) < 0.5
    mask[:, :, 2] = False
    some = mask if visible == "some" else None
    return Part(*(x.transpose(1, 2) for x in (q, k, v)), some, visible == "causal")


def upstream(part: Part) -> Tensor:
    generator = torch.Generator().manual_seed(1)
    return torch.randn(part.q.shape, generator=generator, dtype=torch.float64).to(part.q.dtype)


@pytest.mark.parametrize("max_scores", [2**28, 2 * 4 * 12 * 5])  # at once, and 5 queries at a time
@pytest.mark.parametrize("heads", [4, 2, 1])
@pytest.mark.parametrize("visible", ["all", "causal", "some"])
def test_the_formula_is_what_the_kernel_computes(
    visible: str, heads: int, max_scores: int, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr(kernels, "_MAX_SCORES", max_scores)
    part = make(visible, heads)
    out, lse = CPU.forward(part)
    assert (lse[:, :, 2] == -torch.inf).all() == (visible == "some")
    for ours, theirs in zip(FORMULA.forward(part), (out, lse), strict=True):
        torch.testing.assert_close(ours, theirs, **CLOSE)
    lse = lse.clamp_min(0)  # of the whole, where every query sees something
    ours, theirs = (kernel.backward(part, upstream(part), out, lse) for kernel in (FORMULA, CPU))
    for gradient, expected in zip(ours, theirs, strict=True):
        torch.testing.assert_close(gradient, expected, **CLOSE)


@pytest.mark.parametrize("kernel", [CPU, FORMULA], ids=["cpu", "formula"])
def test_parts_make_the_whole(kernel: kernels.Kernel) -> None:
    """In three parts of the keys; some queries see nothing of some, or of all, of them."""
    whole = make("some", 2)
    assert whole.visible is not None
    whole.visible[0, 0, :6, :7] = False
    out, lse = torch.zeros_like(whole.q), torch.full(whole.q.shape[:-1], -torch.inf).double()
    columns = [slice(0, 4), slice(4, 7), slice(7, 12)]
    parts = [
        Part(whole.q, whole.k[:, :, c], whole.v[:, :, c], whole.visible[..., c], False)
        for c in columns
    ]
    for part in parts:
        kernels.merge(out, lse, *kernel.forward(part))
    for merged, expected in zip((out, lse), kernel.forward(whole), strict=True):
        torch.testing.assert_close(merged, expected, **CLOSE)
    lse = lse.clamp_min(0)
    of_whole = kernel.backward(whole, upstream(whole), out, lse)
    of_parts = [kernel.backward(part, upstream(whole), out, lse) for part in parts]
    torch.testing.assert_close(sum(dq for dq, _, _ in of_parts), of_whole[0], **CLOSE)
    for index in (1, 2):
        joined = torch.cat([gradients[index] for gradients in of_parts], 2)
        torch.testing.assert_close(joined, of_whole[index], **CLOSE)


def test_the_formula_in_16_bit_computes_in_32() -> None:
    exact, rounded = make("some", 2), make("some", 2, dtype=torch.bfloat16)
    out, lse = FORMULA.forward(rounded)
    assert out.dtype == lse.dtype == torch.float32
    inputs = Part(*(x.double() for x in rounded[:3]), exact.visible, False)
    torch.testing.assert_close(out.double(), FORMULA.forward(inputs)[0], rtol=0, atol=1e-6)


def fake_part(dtype: torch.dtype, head_dim: int, masked: bool) -> Part:
    q, k = (
        torch.empty(2, heads, length, head_dim, device="cuda", dtype=dtype)
        for heads, length in ((4, 12), (2, 8))
    )
    visible = torch.empty(2, 1, 12, 8, device="cuda", dtype=torch.bool)
    return Part(q, k, k, visible if masked else None, False)


def test_the_flash_kernel_of_cuda_is_called_by_its_signature() -> None:
    """On fake tensors: the shapes that the kernel's own description gives."""
    with FakeTensorMode():
        part = fake_part(torch.bfloat16, 16, masked=False)
        out, lse = CUDA_FLASH.forward(part)
        assert (out.shape, lse.shape) == (part.q.shape, part.q.shape[:-1])
        gradients = CUDA_FLASH.backward(part, out, out, lse)
        assert [x.shape for x in gradients] == [x.shape for x in part[:3]]


def test_which_kernel_is_chosen() -> None:
    assert choose_kernel(make("some", 2)) is CPU
    with FakeTensorMode():
        for dtype, head_dim, masked, expected in (
            (torch.bfloat16, 16, False, CUDA_FLASH),
            (torch.bfloat16, 256, False, CUDA_FLASH),
            (torch.bfloat16, 20, False, FORMULA),
            (torch.bfloat16, 264, False, FORMULA),
            (torch.bfloat16, 16, True, FORMULA),
            (torch.float32, 16, False, FORMULA),
        ):
            assert choose_kernel(fake_part(dtype, head_dim, masked)) is expected
