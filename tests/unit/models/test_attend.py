"""Attention and its masks, against the formula written out."""

import math

import pytest
import torch

from torchtitan.models import attend
from torchtitan.models.attend import Attend, build_mask


def reference(q, k, v, ids):
    """softmax(q k^T / sqrt(hd)) v with every mask entry spelt out."""
    k, v = (t.repeat_interleave(q.size(1) // t.size(1), dim=1) for t in (k, v))
    scores = q @ k.transpose(2, 3) / math.sqrt(q.size(-1))
    for batch in range(q.size(0)):
        for query in range(q.size(2)):
            for key in range(q.size(2)):
                if key > query or (ids is not None and ids[batch, query] != ids[batch, key]):
                    scores[batch, :, query, key] = -math.inf
    return scores.softmax(-1) @ v


IDS = torch.tensor([[0, 0, 0, 1, 1, 2, 2, 2], [5, 6, 6, 6, 6, 6, 6, 7]])


@pytest.mark.parametrize("kv_heads", [4, 2, 1])
@pytest.mark.parametrize("ids", [None, IDS], ids=["causal", "documents"])
def test_attend(kv_heads, ids):
    generator = torch.Generator().manual_seed(0)
    q, k, v = (
        torch.randn(2, heads, 8, 16, generator=generator, dtype=torch.float64, requires_grad=True)
        for heads in (4, kv_heads, kv_heads)
    )
    out, _ = Attend()(q, k, v, build_mask(ids))
    expected = reference(q, k, v, ids)
    torch.testing.assert_close(out, expected, rtol=0, atol=1e-13)
    upstream = torch.randn(out.shape, generator=generator, dtype=torch.float64)
    ours = torch.autograd.grad(out, (q, k, v), upstream)
    theirs = torch.autograd.grad(expected, (q, k, v), upstream)
    for gradient, exact in zip(ours, theirs):
        torch.testing.assert_close(gradient, exact, rtol=0, atol=1e-13)


def test_compiled_attention_of_models_with_other_heads():
    """In one process, compile takes the sizes of the second model to be symbols."""
    attend = Attend()
    attend.compile(backend="aot_eager", fullgraph=True)
    for heads, kv_heads in ((4, 2), (8, 4), (6, 6)):
        q, k, v = (torch.randn(2, n, 8, 16) for n in (heads, kv_heads, kv_heads))
        torch.testing.assert_close(attend(q, k, v, None)[0], reference(q, k, v, None))


@pytest.mark.filterwarnings("ignore:flex_attention called without")
@pytest.mark.parametrize("kv_heads", [4, 2])
def test_the_kernel_for_cuda_computes_the_same(kv_heads, monkeypatch):
    """FlexAttention uncompiled, which runs anywhere: its mask and its call, not its kernel."""
    from torch.nn.attention import flex_attention

    monkeypatch.setattr(attend, "_compile_once", lambda name: getattr(flex_attention, name))
    q, k, v = (torch.randn(2, heads, 8, 16) for heads in (4, kv_heads, kv_heads))
    out, _ = Attend()(q, k, v, attend._block_mask(IDS))
    torch.testing.assert_close(out, reference(q, k, v, IDS))


def test_no_documents_need_no_mask():
    assert build_mask(None) is None
    assert build_mask(IDS).shape == (2, 1, 8, 8)
