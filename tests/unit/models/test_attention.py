"""Attention and its masks, against the formula written out."""

import math

import pytest
import torch
from torch.library import opcheck

from torchtitan.models import attention
from torchtitan.models.attention import AttentionMaskBuilder, InnerAttention, block_mask
from torchtitan.models.document_attention import document_attention
from torchtitan.models.masks import MaskInputs, default_mask, dense

CPU = torch.device("cpu")


def reference(q, k, v, ids, window=None):
    """softmax(q k^T / sqrt(hd)) v with every mask entry spelt out."""
    k, v = (t.repeat_interleave(q.size(1) // t.size(1), dim=1) for t in (k, v))
    scores = q @ k.transpose(2, 3) / math.sqrt(q.size(-1))
    for batch in range(q.size(0)):
        for query in range(q.size(2)):
            for key in range(q.size(2)):
                apart = ids is not None and ids[batch, query] != ids[batch, key]
                far = window is not None and query - key >= window
                if key > query or apart or far:
                    scores[batch, :, query, key] = -math.inf
    return scores.softmax(-1) @ v


IDS = torch.tensor([[0, 0, 0, 1, 1, 2, 2, 2], [5, 6, 6, 6, 6, 6, 6, 7]])


@pytest.mark.parametrize("window", [None, 1, 3, 7, 8, 100])
@pytest.mark.parametrize("kv_heads", [4, 2, 1])
@pytest.mark.parametrize("ids", [None, IDS], ids=["causal", "documents"])
def test_attend(kv_heads, ids, window):
    generator = torch.Generator().manual_seed(0)
    q, k, v = (
        torch.randn(2, heads, 8, 16, generator=generator, dtype=torch.float64, requires_grad=True)
        for heads in (4, kv_heads, kv_heads)
    )
    out = InnerAttention()(q, k, v, AttentionMaskBuilder(window).build(ids, 8, CPU))
    expected = reference(q, k, v, ids, window)
    torch.testing.assert_close(out, expected, rtol=0, atol=1e-13)
    upstream = torch.randn(out.shape, generator=generator, dtype=torch.float64)
    ours = torch.autograd.grad(out, (q, k, v), upstream)
    theirs = torch.autograd.grad(expected, (q, k, v), upstream)
    for gradient, exact in zip(ours, theirs):
        torch.testing.assert_close(gradient, exact, rtol=0, atol=1e-13)


@pytest.mark.parametrize("ids", [None, IDS])
def test_compiled_attention_of_models_with_other_heads(ids):
    """In one process, compile takes the sizes of the second model to be symbols."""
    attend = InnerAttention()
    attend.compile(backend="aot_eager", fullgraph=True)
    for heads, kv_heads in ((4, 2), (8, 4), (6, 6)):
        q, k, v = (torch.randn(2, n, 8, 16) for n in (heads, kv_heads, kv_heads))
        torch.testing.assert_close(attend(q, k, v, ids), reference(q, k, v, ids))


def test_the_operator_for_documents():
    """Gradients, strides and the fake version, as torch wants them of a custom operator."""
    q, k, v = (
        torch.randn(2, 8, heads, 16, dtype=torch.float64).transpose(1, 2).requires_grad_()
        for heads in (4, 2, 2)
    )
    opcheck(document_attention, (q, k, v, IDS))
    with pytest.MonkeyPatch.context() as patch:  # no mask over all pairs
        patch.setattr("torch.nn.functional.scaled_dot_product_attention", None)
        InnerAttention()(q, k, v, AttentionMaskBuilder().build(IDS, 8, CPU)).sum().backward()


@pytest.mark.filterwarnings("ignore:flex_attention called without")
@pytest.mark.parametrize("kv_heads", [4, 2])
@pytest.mark.parametrize(
    ("ids", "window"),
    [(IDS, None), (None, 3), (IDS, 2)],
    ids=["documents", "window", "both"],
)
def test_the_kernel_for_cuda_computes_the_same(kv_heads, ids, window, monkeypatch):
    """FlexAttention uncompiled, which runs anywhere: its mask and its call, not its kernel."""
    from torch.nn.attention import flex_attention

    monkeypatch.setattr(attention, "_compile_once", lambda name: getattr(flex_attention, name))
    q, k, v = (torch.randn(2, heads, 8, 16) for heads in (4, kv_heads, kv_heads))
    inputs = MaskInputs(8, ids, window)
    mask = block_mask(default_mask(inputs), inputs, CPU)
    out = InnerAttention()(q, k, v, mask)
    torch.testing.assert_close(out, reference(q, k, v, ids, window))


def test_block_masks_of_closures_compile_as_one_graph(monkeypatch):
    """How they are made on CUDA, but for the generated code; for other documents it is the same."""
    from torch.nn.attention import flex_attention

    compiled = torch.compile(flex_attention.create_block_mask, backend="aot_eager", fullgraph=True)
    monkeypatch.setattr(attention, "_compile_once", lambda name: compiled)
    places = torch.arange(512).expand(2, -1)
    for ids in (places // 200, places // torch.tensor([[90], [400]])):
        inputs = MaskInputs(512, ids, 140)
        mask = block_mask(default_mask(inputs), inputs, CPU)
        touched = (
            dense(default_mask(inputs), inputs, CPU).unflatten(3, (4, 128)).unflatten(2, (4, 128))
        )
        assert torch.equal(mask.to_dense().bool(), touched.any(5).any(3))  # of 128 x 128 pairs
        assert not mask.to_dense().all()


@pytest.mark.parametrize("window", [None, 1, 3, 8])
@pytest.mark.parametrize("ids", [None, IDS])
def test_dense_masks(ids, window):
    inputs = MaskInputs(8, ids, window)
    expected = torch.ones(8, 8, dtype=torch.bool).tril().triu(1 - (window or 8))[None]
    if ids is not None:
        expected = expected & (ids.unsqueeze(2) == ids.unsqueeze(1))
    assert torch.equal(dense(default_mask(inputs), inputs, CPU), expected.unsqueeze(1))


def test_what_needs_no_mask():
    assert AttentionMaskBuilder().build(None, 8, CPU) is None
    assert AttentionMaskBuilder(8).build(None, 8, CPU) is None
    assert AttentionMaskBuilder(7).build(None, 8, CPU).shape == (1, 1, 8, 8)
    assert AttentionMaskBuilder()(IDS, IDS) is IDS
    assert AttentionMaskBuilder(8)(IDS, IDS) is IDS
    assert AttentionMaskBuilder(7)(IDS, IDS).shape == (2, 1, 8, 8)
