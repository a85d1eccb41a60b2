"""Cross entropy summed over targets: plain and in chunks it is the same."""

import math

import pytest
import torch
import torch.nn.functional as F

from torchtitan.loss.cross_entropy import CrossEntropyLoss
from torchtitan.models.batch import IGNORE_INDEX, Batch
from torchtitan.models.decoder.model import Head

VOCAB, DIM = 37, 16


def problem(dtype: torch.dtype, ignored: float = 0.3) -> tuple[torch.Tensor, Head, Batch]:
    """Hidden states `[3, 7, 16]`, a head, and labels of which a part is ignored."""
    generator = torch.Generator().manual_seed(0)
    hidden = torch.randn(3, 7, DIM, generator=generator).to(dtype).requires_grad_()
    head = Head(DIM, VOCAB, bias=False)
    with torch.no_grad():
        head.weight.copy_(torch.randn(VOCAB, DIM, generator=generator))
    labels = torch.randint(VOCAB, (3, 7), generator=generator)
    labels[torch.rand(3, 7, generator=generator) < ignored] = IGNORE_INDEX
    return hidden, head.to(dtype), Batch(labels=labels)


def loss_and_gradients(num_chunks: int | None, dtype: torch.dtype, ignored: float = 0.3):
    hidden, head, batch = problem(dtype, ignored)
    total = CrossEntropyLoss(num_chunks=num_chunks).sum(hidden, head, batch)
    (total * 0.25).backward()  # as after the division by the number of targets
    return total.detach(), hidden.grad, head.weight.grad


def exact(ignored: float = 0.3, dtype: torch.dtype = torch.float64):
    """Of the same rounded inputs, in float64, from the definition."""
    hidden, head, batch = problem(dtype, ignored)
    hidden = hidden.detach().double().requires_grad_()
    weight = head.weight.detach().double().requires_grad_()
    targets = batch["labels"].flatten() != IGNORE_INDEX
    log_probabilities = torch.log_softmax(hidden.flatten(0, 1) @ weight.t(), -1)[targets]
    labels = batch["labels"].flatten()[targets]
    total = -log_probabilities[torch.arange(len(labels)), labels].sum()
    (total * 0.25).backward()
    return total.detach(), hidden.grad, weight.grad


@pytest.mark.parametrize("num_chunks", [None, 1, 2, 4, 8, 21, 1000])
@pytest.mark.parametrize(
    ("dtype", "tolerance"), [(torch.float64, 1e-14), (torch.float32, 1e-6), (torch.bfloat16, 0.02)]
)
def test_sum_and_gradients(num_chunks, dtype, tolerance):
    results = loss_and_gradients(num_chunks, dtype)
    assert results[0].dtype == (torch.float64 if dtype == torch.float64 else torch.float32)
    for ours, reference in zip(results, exact(dtype=dtype)):
        assert (ours - reference).abs().max() / reference.abs().max() < tolerance


@pytest.mark.parametrize("num_chunks", [1, 3])
def test_no_targets_give_zero_and_no_gradient(num_chunks):
    total, grad_hidden, grad_weight = loss_and_gradients(num_chunks, torch.float32, ignored=2.0)
    assert total == 0 and grad_hidden.count_nonzero() == 0 and grad_weight.count_nonzero() == 0


@pytest.mark.parametrize("num_chunks", [1, 3])
def test_without_gradients(num_chunks, monkeypatch):
    def refuse(*args, **kwargs):
        raise AssertionError("a gradient was computed")

    monkeypatch.setattr(torch, "mm", refuse)
    hidden, head, batch = problem(torch.float64)
    with torch.no_grad():
        total = CrossEntropyLoss(num_chunks=num_chunks).sum(hidden, head, batch)
    assert not total.requires_grad
    torch.testing.assert_close(total, exact()[0])


@pytest.mark.parametrize("frozen", ["head", "hidden"])
def test_one_side_frozen(frozen):
    hidden, head, batch = problem(torch.float64)
    (head.weight if frozen == "head" else hidden).requires_grad_(False)
    (CrossEntropyLoss(num_chunks=3).sum(hidden, head, batch) * 0.25).backward()
    _, grad_hidden, grad_weight = exact()
    if frozen == "head":
        assert head.weight.grad is None
        torch.testing.assert_close(hidden.grad, grad_hidden)
    else:
        assert hidden.grad is None
        torch.testing.assert_close(head.weight.grad, grad_weight)


def test_confident_mistakes_stay_finite():
    """A target whose probability is 0 in float32 still has the right loss."""
    head = Head(1, 3, bias=False)
    with torch.no_grad():
        head.weight.copy_(torch.tensor([[500.0], [0.0], [-500.0]]))
    hidden, batch = torch.ones(1, 2, 1), Batch(labels=torch.tensor([[2, 0]]))
    for num_chunks in (1, 2):
        assert CrossEntropyLoss(num_chunks=num_chunks).sum(hidden, head, batch).item() == 1000.0


def test_the_weights_gradient_is_summed_wide():
    """Many small contributions to one weight: in bfloat16 the later ones would be lost."""
    rows = 4096
    head = Head(1, 2, bias=False).to(torch.bfloat16)
    with torch.no_grad():
        head.weight.zero_()
    hidden = torch.ones(1, rows, 1, dtype=torch.bfloat16)
    batch = Batch(labels=torch.zeros(1, rows, dtype=torch.int64))
    total = CrossEntropyLoss(num_chunks=rows).sum(hidden, head, batch)
    total.backward()
    assert total.item() == pytest.approx(rows * math.log(2), rel=1e-4)
    assert head.weight.grad.flatten().tolist() == [-rows / 2, rows / 2]


def test_logits_exist_one_chunk_at_a_time(monkeypatch):
    sizes = []
    log_softmax = F.log_softmax

    def spy(logits, *args, **kwargs):
        sizes.append(len(logits))
        return log_softmax(logits, *args, **kwargs)

    monkeypatch.setattr(F, "log_softmax", spy)
    hidden, head, batch = problem(torch.float32)
    CrossEntropyLoss(num_chunks=4).sum(hidden, head, batch)
    assert sizes == [6, 6, 6, 3]


@pytest.mark.parametrize(
    ("num_tokens", "size"),
    [(1, 1), (511, 511), (1023, 1023), (1024, 512), (2048, 512), (4096, 512), (8192, 1024)],
)
def test_as_many_chunks_as_cost_no_time(num_tokens: int, size: int) -> None:
    assert CrossEntropyLoss(num_chunks=None).chunk_size(num_tokens) == size
    assert CrossEntropyLoss(num_chunks=8).chunk_size(num_tokens) == -(-num_tokens // 8)


def test_count():
    batch = Batch(labels=torch.tensor([[1, IGNORE_INDEX, 0], [IGNORE_INDEX, 5, 5]]))
    count = CrossEntropyLoss(num_chunks=2).count(batch)
    assert count.item() == 4 and count.dtype == torch.int64
