"""Losses where each rank has the logits of a part of the vocabulary: as of all at once."""

from functools import partial

import numpy as np
import pytest
import torch
import torch.distributed as dist
import torch.nn.functional as F
from torch import Tensor, nn

from tests.pool import GlooPool
from torchtitan.distributed.context import DistributedContext
from torchtitan.loss.chunked import ChunkedLoss
from torchtitan.loss.cross_entropy import CrossEntropyLoss
from torchtitan.loss.registry import CrossEntropySettings
from torchtitan.loss.vocab_parallel import VocabShard
from torchtitan.models.batch import IGNORE_INDEX, Batch
from torchtitan.models.decoder.model import Head

PLAIN = CrossEntropySettings()


class ByAutograd(ChunkedLoss):
    """The cross entropy as a loss of one's own, which knows nothing of a cut."""

    def token_losses(self, logits: Tensor, labels: Tensor) -> Tensor:
        return F.cross_entropy(logits, labels, reduction="none")


def cut_loss(
    world: DistributedContext,
    vocab_size: int,
    num_chunks: int,
    gather: bool,
    dtype: torch.dtype,
    scale: float,
    settings: CrossEntropySettings = PLAIN,
    kind: type[ChunkedLoss] = CrossEntropyLoss,
) -> tuple[str, list[np.ndarray]]:
    """The loss's type; loss, gradient for the hidden states, and for the whole weight; the terms
    of the loss."""
    hidden, weight, labels = loss_problem(vocab_size, dtype, scale)
    shard = VocabShard(vocab_size, dist.group.WORLD, gather)
    mine = weight.chunk(world.world_size)[world.rank]
    head = Head(8, len(mine), bias=False).to(dtype)
    head.weight = nn.Parameter(mine.clone())
    hidden.requires_grad_()
    objective = kind(settings, num_chunks, shard)
    loss = objective.sum(hidden, head, Batch(labels=labels))
    (loss / 4).backward()
    assert hidden.grad is not None and head.weight.grad is not None
    dist.all_reduce(hidden.grad)
    rows = [torch.empty(len(part), 8, dtype=dtype) for part in weight.chunk(world.world_size)]
    for source, part in enumerate(rows):
        dist.broadcast(part.copy_(head.weight.grad) if source == world.rank else part, source)
    terms = objective.take_terms().values()
    results = (loss.detach(), hidden.grad, torch.cat(rows), *terms)
    return str(loss.dtype), [result.double().numpy() for result in results]


def loss_problem(vocab_size: int, dtype: torch.dtype, scale: float) -> tuple[Tensor, ...]:
    generator = torch.Generator().manual_seed(vocab_size)
    hidden = torch.randn(3, 7, 8, generator=generator)
    weight = torch.randn(vocab_size, 8, generator=generator) * scale
    labels = torch.randint(vocab_size, (3, 7), generator=generator)
    labels[0, :5] = IGNORE_INDEX
    labels[1, :2] = torch.tensor([0, vocab_size - 1])
    return hidden.to(dtype), weight.to(dtype), labels


def exact_loss(
    vocab_size: int, dtype: torch.dtype, scale: float, settings: CrossEntropySettings = PLAIN
) -> list[np.ndarray]:
    hidden, weight, labels = loss_problem(vocab_size, dtype, scale)
    hidden, weight = hidden.double().requires_grad_(), weight.double().requires_grad_()
    logits = (hidden @ weight.t()).flatten(0, 1)
    labels, log_z = labels.flatten(), logits.logsumexp(-1)
    cross_entropy = partial(F.cross_entropy, ignore_index=IGNORE_INDEX, reduction="sum")
    loss = cross_entropy(logits, labels, label_smoothing=settings.label_smoothing)
    loss = loss + settings.z_loss_weight * log_z[labels != IGNORE_INDEX].square().sum()
    (loss / 4).backward()
    assert hidden.grad is not None and weight.grad is not None
    terms = [] if settings.plain else [cross_entropy(logits, labels)]
    return [result.detach().numpy() for result in (loss, hidden.grad, weight.grad, *terms)]


def close(ours: np.ndarray, theirs: np.ndarray, tolerance: float) -> bool:
    return bool(np.abs(ours - theirs).max() / np.abs(theirs).max() < tolerance)


@pytest.mark.parametrize("gather", [False, True], ids=["cut", "gathered"])
@pytest.mark.parametrize("num_chunks", [1, 4])
@pytest.mark.parametrize(("vocab_size", "degree"), [(131, 2), (132, 4), (130, 4), (7, 4), (2, 2)])
def test_loss_of_a_cut_vocabulary(
    vocab_size: int, degree: int, num_chunks: int, gather: bool, gloo_pool: GlooPool
) -> None:
    arguments = (vocab_size, num_chunks, gather, torch.float64, 1.0)
    expected = exact_loss(vocab_size, torch.float64, 1.0)
    for _, results in gloo_pool.run(degree, cut_loss, *arguments):
        assert all(close(*pair, 1e-14) for pair in zip(results, expected, strict=True))


@pytest.mark.parametrize("gather", [False, True], ids=["cut", "gathered"])
@pytest.mark.parametrize(
    "settings",
    [
        {"z_loss_weight": 0.3},
        {"label_smoothing": 0.2},
        {"z_loss_weight": 1, "label_smoothing": 0.1},
    ],
    ids=lambda settings: " ".join(settings),
)
@pytest.mark.parametrize(("vocab_size", "degree"), [(131, 2), (7, 4)])
def test_regularised_loss_of_a_cut_vocabulary(
    vocab_size: int, degree: int, settings: dict[str, float], gather: bool, gloo_pool: GlooPool
) -> None:
    given = CrossEntropySettings(**settings)
    expected = exact_loss(vocab_size, torch.float64, 1.0, given)
    for _, results in gloo_pool.run(
        degree, cut_loss, vocab_size, 4, gather, torch.float64, 1.0, given
    ):
        assert all(close(*pair, 1e-14) for pair in zip(results, expected, strict=True))


@pytest.mark.parametrize(("vocab_size", "degree"), [(131, 2), (7, 4)])
def test_loss_of_ones_own_of_a_cut_vocabulary(
    vocab_size: int, degree: int, gloo_pool: GlooPool
) -> None:
    arguments = (vocab_size, 4, False, torch.float64, 1.0, PLAIN, ByAutograd)
    expected = exact_loss(vocab_size, torch.float64, 1.0)
    for _, results in gloo_pool.run(degree, cut_loss, *arguments):
        assert all(close(*pair, 1e-14) for pair in zip(results, expected, strict=True))


@pytest.mark.parametrize("gather", [False, True], ids=["cut", "gathered"])
@pytest.mark.parametrize(
    ("dtype", "tolerance"), [(torch.float32, 2e-6), (torch.bfloat16, 2e-2)], ids=str
)
def test_large_logits_in_narrow_types(
    dtype: torch.dtype, tolerance: float, gather: bool, gloo_pool: GlooPool
) -> None:
    """Logits of several hundreds, whose exponentials overflow float32 unless shifted by the
    largest of the whole vocabulary."""
    expected = exact_loss(131, dtype, 100.0)
    for of_type, results in gloo_pool.run(2, cut_loss, 131, 4, gather, dtype, 100.0):
        assert of_type == "torch.float32"
        assert all(close(*pair, tolerance) for pair in zip(results, expected, strict=True))
