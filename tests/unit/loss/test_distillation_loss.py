"""Memory of distillation, and a teacher that is the model; tests/parity has the values."""

import pytest
import torch

from tests.unit.loss.test_regularised_loss import LargestAtOnce
from torchtitan.loss.distillation import DistillationLoss
from torchtitan.loss.registry import DistillationSettings
from torchtitan.models.batch import Batch
from torchtitan.models.decoder.model import Head


def trained(settings: DistillationSettings, chunks: int, teacher: Head, own: Head) -> torch.Tensor:
    """The sum of 512 targets of 1,000 classes, after its backward."""
    torch.manual_seed(0)
    hidden = torch.randn(1, 512, 8, requires_grad=True)
    shape = (1, 512)
    batch = Batch(tokens=torch.zeros(shape), labels=torch.randint(1000, shape))
    loss = DistillationLoss(settings, num_chunks=chunks)
    frozen_pass = loss.frozen_pass()
    with torch.no_grad():
        frozen_pass.sum(hidden, teacher, batch)
    [batch] = frozen_pass.annotated([batch])
    loss.sum(hidden, own, batch).backward()
    return loss.take_terms()["divergence"]


@pytest.mark.parametrize("top_k", [None, 10])
def test_logits_exist_one_chunk_at_a_time(top_k: int | None) -> None:
    """Some copies of a chunk's logits exist at a time, never all 2 MiB of one model's."""
    settings = DistillationSettings(teacher_path="x", top_k=top_k)
    heads = Head(8, 1000, bias=False), Head(8, 1000, bias=False)
    with LargestAtOnce() as whole:
        trained(settings, 1, *heads)
    with LargestAtOnce() as parts:
        trained(settings, 16, *heads)
    assert whole.bytes > 3 * 512 * 1000 * 4
    assert parts.bytes < 512 * 1000 * 4


def test_a_model_is_its_own_teacher() -> None:
    settings = DistillationSettings(teacher_path="x", temperature=3.0)
    head, other = Head(8, 1000, bias=False), Head(8, 1000, bias=False)
    assert abs(trained(settings, 4, head, head).item()) < 1e-3
    assert trained(settings, 4, other, head).item() > 1
