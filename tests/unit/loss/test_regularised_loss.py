"""z-loss and label smoothing in chunks, and a loss of one's own: as PyTorch's own functions say."""

import weakref

import pytest
import torch
import torch.nn.functional as F
from torch import Tensor
from torch.utils._python_dispatch import TorchDispatchMode
from torch.utils._pytree import tree_leaves

from tests.unit.loss.test_loss import problem
from torchtitan.config.schema import Loss
from torchtitan.loss.chunked import ChunkedLoss
from torchtitan.loss.cross_entropy import CrossEntropyLoss, build_losses
from torchtitan.loss.registry import LOSSES, CrossEntropySettings, register_loss
from torchtitan.models.batch import IGNORE_INDEX, Batch
from torchtitan.models.decoder.model import Head

SETTINGS = [
    {"z_loss_weight": 0.3},
    {"label_smoothing": 0.2},
    {"z_loss_weight": 1e-2, "label_smoothing": 0.1},
]


def exact(
    hidden: Tensor, weight: Tensor, labels: Tensor, z_loss_weight=0.0, label_smoothing=0.0
) -> Tensor:
    """At once, from PyTorch's functions."""
    logits = hidden.flatten(0, 1) @ weight.t()
    labels = labels.flatten()
    log_z = logits.logsumexp(-1)[labels != IGNORE_INDEX]
    smoothed = F.cross_entropy(
        logits,
        labels,
        ignore_index=IGNORE_INDEX,
        reduction="sum",
        label_smoothing=label_smoothing,
    )
    return smoothed + z_loss_weight * log_z.square().sum()


def gradients(loss: Tensor, hidden: Tensor, weight: Tensor) -> list[Tensor]:
    return [loss.detach(), *torch.autograd.grad(loss * 0.25, [hidden, weight])]


def assert_close(ours: list[Tensor], theirs: list[Tensor], tolerance: float) -> None:
    for our, their in zip(ours, theirs, strict=True):
        assert (our - their).abs().max() / their.abs().max() < tolerance


@pytest.mark.parametrize("num_chunks", [1, 4, 21, 1000])
@pytest.mark.parametrize("settings", SETTINGS, ids=" ".join)
@pytest.mark.parametrize(
    ("dtype", "tolerance"), [(torch.float64, 1e-14), (torch.float32, 1e-6), (torch.bfloat16, 0.02)]
)
def test_sum_and_gradients(settings, num_chunks, dtype, tolerance):
    hidden, head, batch = problem(dtype)
    loss = CrossEntropyLoss(CrossEntropySettings(**settings), num_chunks)
    ours = gradients(loss.sum(hidden, head, batch), hidden, head.weight)
    wide = hidden.detach().double().requires_grad_(), head.weight.detach().double().requires_grad_()
    theirs = gradients(exact(*wide, batch["labels"], **settings), *wide)
    assert_close(ours, theirs, tolerance)


@pytest.mark.parametrize("settings", SETTINGS, ids=" ".join)
def test_the_plain_cross_entropy_is_reported(settings):
    hidden, head, batch = problem(torch.float64)
    loss = CrossEntropyLoss(CrossEntropySettings(**settings), num_chunks=4)
    assert loss.terms == ("cross_entropy",)
    total = sum(loss.sum(hidden, head, batch) for _ in range(2))
    plain = exact(hidden, head.weight, batch["labels"]).detach()
    torch.testing.assert_close(loss.take_terms(), {"cross_entropy": 2 * plain}, rtol=1e-14, atol=0)
    assert loss.take_terms() == {} and abs(total - 2 * plain) > 1


def test_the_plain_loss_reports_nothing():
    hidden, head, batch = problem(torch.float64)
    loss = CrossEntropyLoss(num_chunks=4)
    loss.sum(hidden, head, batch)
    assert loss.terms == () and loss.take_terms() == {}


@pytest.mark.parametrize("settings", SETTINGS, ids=" ".join)
@pytest.mark.parametrize("num_chunks", [1, 3])
def test_no_targets_give_zero_and_no_gradient(settings, num_chunks):
    hidden, head, batch = problem(torch.float32, ignored=2.0)
    loss = CrossEntropyLoss(CrossEntropySettings(**settings), num_chunks)
    results = gradients(loss.sum(hidden, head, batch), hidden, head.weight)
    assert all(result.count_nonzero() == 0 for result in results)
    assert loss.take_terms()["cross_entropy"] == 0


@pytest.mark.parametrize("settings", SETTINGS, ids=" ".join)
def test_chunks_without_targets(settings):
    """Whole chunks of the padding at the end of a batch."""
    hidden, head, batch = problem(torch.float64)
    batch["labels"].flatten()[6:18] = IGNORE_INDEX
    loss = CrossEntropyLoss(CrossEntropySettings(**settings), num_chunks=7)
    ours = gradients(loss.sum(hidden, head, batch), hidden, head.weight)
    theirs = gradients(exact(hidden, head.weight, batch["labels"], **settings), hidden, head.weight)
    assert_close(ours, theirs, 1e-14)


@pytest.mark.parametrize("settings", SETTINGS, ids=" ".join)
def test_tied_embeddings(settings):
    """The head's weight has a second gradient, through the hidden states."""
    _, head, batch = problem(torch.float64)
    tokens = torch.arange(21).view(3, 7)

    def gradient(of) -> list[Tensor]:
        loss = of(head.weight[tokens].sin())
        return [loss.detach(), *torch.autograd.grad(loss, [head.weight])]

    loss = CrossEntropyLoss(CrossEntropySettings(**settings), num_chunks=4)
    ours = gradient(lambda hidden: loss.sum(hidden, head, batch))
    theirs = gradient(lambda hidden: exact(hidden, head.weight, batch["labels"], **settings))
    assert_close(ours, theirs, 1e-14)


def test_z_loss_of_a_target_that_is_far_below():
    """log(Z) is the largest logit here; taken from the target's it would lose all digits."""
    head = Head(1, 2, bias=False)
    with torch.no_grad():
        head.weight.copy_(torch.tensor([[0.1], [-1e6]]))
    loss = CrossEntropyLoss(CrossEntropySettings(z_loss_weight=1e8), num_chunks=2)
    total = loss.sum(torch.ones(1, 1, 1), head, Batch(labels=torch.tensor([[1]])))
    assert total.item() - loss.take_terms()["cross_entropy"].item() == pytest.approx(1e6, rel=1e-5)


class LargestAtOnce(TorchDispatchMode):
    """The most bytes that tensors made within had together, at any time."""

    def __init__(self):
        super().__init__()
        self._alive: dict[int, int] = {}
        self.bytes = 0

    def __torch_dispatch__(self, function, types, args=(), kwargs=None):
        made = function(*args, **(kwargs or {}))
        for tensor in tree_leaves(made):
            storage = tensor.untyped_storage() if isinstance(tensor, Tensor) else None
            if storage is not None and storage._cdata not in self._alive:
                self._alive[storage._cdata] = storage.nbytes()
                weakref.finalize(storage, self._alive.pop, storage._cdata, None)
        self.bytes = max(self.bytes, sum(self._alive.values()))
        return made


def largest_at_once(loss: ChunkedLoss, positions: int, vocabulary: int) -> int:
    hidden = torch.randn(1, positions, 4, requires_grad=True)
    head = Head(4, vocabulary, bias=False)
    batch = Batch(labels=torch.randint(vocabulary, (1, positions)))
    with LargestAtOnce() as largest:
        loss.sum(hidden, head, batch).backward()
    return largest.bytes


@pytest.mark.parametrize("settings", [{}, *SETTINGS], ids=" ".join)
def test_logits_exist_one_chunk_at_a_time(settings):
    """Those of a chunk, and their log probabilities, of which the gradient is made in place."""
    of_chunk = 50 * 5000 * torch.float32.itemsize
    chunked = CrossEntropyLoss(CrossEntropySettings(**settings), num_chunks=8)
    assert 2 * of_chunk < largest_at_once(chunked, 400, 5000) < 2.5 * of_chunk
    assert largest_at_once(CrossEntropyLoss(), 400, 5000) > 16 * of_chunk


def test_a_loss_of_ones_own_is_in_chunks_too():
    of_chunk = 50 * 5000 * torch.float32.itemsize
    assert largest_at_once(Focal(None, num_chunks=8), 400, 5000) < 6 * of_chunk


# A loss of one's own


class Focal(ChunkedLoss):
    def token_losses(self, logits: Tensor, labels: Tensor) -> Tensor:
        losses = F.cross_entropy(logits, labels, reduction="none")
        return (1 - losses.neg().exp()) ** 2 * losses


def exact_focal(hidden: Tensor, weight: Tensor, labels: Tensor) -> Tensor:
    logits = hidden.flatten(0, 1) @ weight.t()
    targets = labels.flatten() != IGNORE_INDEX
    losses = F.cross_entropy(logits[targets], labels.flatten()[targets], reduction="none")
    return ((1 - losses.neg().exp()) ** 2 * losses).sum()


@pytest.mark.parametrize("num_chunks", [1, 4, 1000])
@pytest.mark.parametrize("ignored", [0.3, 2.0])
def test_a_loss_of_ones_own(num_chunks, ignored):
    hidden, head, batch = problem(torch.float64, ignored)
    ours = gradients(Focal(None, num_chunks).sum(hidden, head, batch), hidden, head.weight)
    theirs = gradients(exact_focal(hidden, head.weight, batch["labels"]), hidden, head.weight)
    for our, their in zip(ours, theirs, strict=True):
        torch.testing.assert_close(our, their, rtol=1e-13, atol=1e-15)


def test_a_mean_in_place_of_the_losses_of_tokens_is_noticed():
    class Mean(ChunkedLoss):
        def token_losses(self, logits: Tensor, labels: Tensor) -> Tensor:
            return F.cross_entropy(logits, labels)

    hidden, head, batch = problem(torch.float64)
    with pytest.raises(ValueError, match=r"^Mean\.token_losses gives \[\] for \d+ tokens, not one"):
        Mean(None, 2).sum(hidden, head, batch)


def test_a_loss_of_ones_own_computes_in_float32():
    hidden, head, batch = problem(torch.bfloat16)
    seen = []

    class Spy(Focal):
        def token_losses(self, logits: Tensor, labels: Tensor) -> Tensor:
            seen.append((logits.dtype, len(logits), labels.min().item()))
            return super().token_losses(logits, labels)

    total = Spy(None, 4).sum(hidden, head, batch)
    total.backward()
    assert total.dtype == torch.float32 and head.weight.grad.dtype == torch.bfloat16
    assert {dtype for dtype, _, _ in seen} == {torch.float32}
    assert [rows for _, rows, _ in seen] == [6, 6, 6, 3] and min(m for *_, m in seen) >= 0


def test_a_loss_of_ones_own_without_gradients():
    hidden, head, batch = problem(torch.float64)
    with torch.no_grad():
        total = Focal(None, 4).sum(hidden, head, batch)
    assert not total.requires_grad
    torch.testing.assert_close(total, exact_focal(hidden, head.weight, batch["labels"]).detach())


# What evaluation is of


def test_evaluation_is_of_the_plain_cross_entropy():
    section = Loss(args={"z_loss_weight": 0.5, "label_smoothing": 0.1})
    loss, evaluation = build_losses(section, num_chunks=4, shard=None)
    hidden, head, batch = problem(torch.float64)
    plain = exact(hidden, head.weight, batch["labels"])
    with torch.no_grad():
        torch.testing.assert_close(evaluation.sum(hidden, head, batch), plain.detach())
        assert loss.sum(hidden, head, batch) > plain + 1
    assert build_losses(Loss(), 4, None)[1].count(batch) == loss.count(batch)


def test_a_loss_may_say_what_evaluation_is_of(monkeypatch):
    class Own(Focal):
        @property
        def evaluation(self) -> ChunkedLoss:
            return self

    monkeypatch.setattr(LOSSES, "_registered", dict(LOSSES._registered))
    register_loss("own")(Own)
    loss, evaluation = build_losses(Loss(name="own"), 2, None)
    assert loss is evaluation and isinstance(loss, Own)
