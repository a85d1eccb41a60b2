"""The losses of the table from PyTorch's own functions, on a model that is not sharded."""

from collections.abc import Callable, Sequence
from pathlib import Path
from typing import NamedTuple

import torch
import torch.nn.functional as F
from torch import Tensor, nn

from tests.distributed import tiny
from tests.distributed.tiny import Case
from torchtitan.loss.registry import (
    CrossEntropySettings,
    DistillationSettings,
    DPOSettings,
    loss_settings,
)
from torchtitan.models.batch import IGNORE_INDEX
from torchtitan.models.registry import get_family
from torchtitan.parallel.initialize import initialize_parameters
from torchtitan.weights.description import describe_model
from torchtitan.weights.source import open_weights


class Plain(NamedTuple):
    """Means over the case's data."""

    loss: Tensor
    evaluated: Tensor
    terms: Sequence[Tensor] = ()


def plain_losses(case: Case, model: nn.Module) -> Callable[[], Plain]:
    """Return what computes the losses of the case's data."""
    settings = loss_settings(case.config().loss)
    if isinstance(settings, DPOSettings):
        return _preference(case, model, settings)
    if isinstance(settings, DistillationSettings):
        return _distillation(case, model, settings)
    return _cross_entropy(case, model, settings)


def _forward(case: Case, model: nn.Module) -> Tensor:
    batch = tiny.data_of(case)
    inputs = [batch["tokens"], batch["positions"]] + [batch["document_ids"]] * case.document_mask
    return model.head(model(*inputs))


def _cross_entropy(
    case: Case, model: nn.Module, settings: CrossEntropySettings
) -> Callable[[], Plain]:
    labels = tiny.data_of(case)["labels"].flatten()

    def losses() -> Plain:
        logits = _forward(case, model).flatten(0, 1)
        smoothed = F.cross_entropy(
            logits, labels, ignore_index=IGNORE_INDEX, label_smoothing=settings.label_smoothing
        )
        log_z = logits[labels != IGNORE_INDEX].logsumexp(-1)
        loss = smoothed + settings.z_loss_weight * log_z.square().mean()
        plain = F.cross_entropy(logits, labels, ignore_index=IGNORE_INDEX).detach()
        return Plain(loss, plain, () if settings.plain else (plain,))

    return losses


def _distillation(
    case: Case, model: nn.Module, settings: DistillationSettings
) -> Callable[[], Plain]:
    """Computed from the logits of all tokens at once."""
    assert settings.teacher_path is not None
    path, labels = Path(settings.teacher_path), tiny.data_of(case)["labels"].flatten()
    description = describe_model(path)
    family, args = get_family(description.family), description.resolved()
    teacher = family.build(args).double()
    open_weights(path, family, args).load(dict(teacher.named_parameters()))
    is_target, temperature = labels != IGNORE_INDEX, settings.temperature
    with torch.no_grad():
        of_teacher = _forward(case, teacher).flatten(0, 1)[is_target] / temperature
    if settings.top_k:
        least = of_teacher.sort(descending=True).values[:, settings.top_k - 1 : settings.top_k]
        of_teacher = of_teacher.masked_fill(of_teacher < least, -torch.inf)
    p = of_teacher.softmax(-1)

    def losses() -> Plain:
        logits = _forward(case, model).flatten(0, 1)[is_target]
        plain = F.cross_entropy(logits, labels[is_target])
        log_q = (logits / temperature).log_softmax(-1)
        divergence = F.kl_div(log_q, p, reduction="batchmean") * temperature**2
        loss = settings.weight * divergence + (1 - settings.weight) * plain
        return Plain(loss, plain.detach(), [plain.detach(), divergence.detach()])

    return losses


def _preference(case: Case, model: nn.Module, settings: DPOSettings) -> Callable[[], Plain]:
    """Pair by pair, with chosen and rejected rewards, margins and accuracies."""
    config, batch = case.config(), tiny.data_of(case)
    family = get_family(config.model.name)
    reference = family.build(family.resolve(config.model, tiny.VOCAB_SIZE)).double()
    initialize_parameters(reference, reference.init_rule, tiny.REFERENCE_SEED)
    beta, smoothing, variant = settings.beta, settings.label_smoothing, settings.variant

    def answers(logits: Tensor) -> tuple[list[Tensor], list[int]]:
        """Log-probabilities and lengths, in order."""
        found, lengths = [], []
        for row, documents in enumerate(batch["document_ids"]):
            for number in range(int(documents.max())):  # the last one is padding
                labels = batch["labels"][row].masked_fill(documents != number, IGNORE_INDEX)
                total = F.cross_entropy(logits[row], labels, reduction="sum")
                found.append(-total)
                lengths.append(int((labels != IGNORE_INDEX).sum()))
        return found, lengths

    with torch.no_grad():
        of_reference, lengths = answers(_forward(case, reference))

    def losses() -> Plain:
        own, _ = answers(_forward(case, model))
        pairs = []
        for first in range(0, len(own), 2):
            both = range(first, first + 2)
            if variant == "simpo":
                scores = rewards = [own[n] / lengths[n] for n in both]
            else:
                scores = rewards = [own[n] - of_reference[n] for n in both]
            if variant == "ipo":
                scores = [scores[n - first] / lengths[n] for n in both]
            x = scores[0] - scores[1]
            right, wrong = (F.softplus(sign * (settings.margin - beta * x)) for sign in (1.0, -1.0))
            loss = (1 - smoothing) * right + smoothing * wrong
            if variant == "ipo":
                loss = (x - 1 / (2 * beta)) ** 2
            if variant == "robust":
                loss = ((1 - smoothing) * right - smoothing * wrong) / (1 - 2 * smoothing)
            chosen, rejected = (beta * reward.detach() for reward in rewards)
            better = (chosen > rejected).double()
            pairs.append(torch.stack([loss, chosen, rejected, chosen - rejected, better]))
        loss, *terms = torch.stack(pairs).mean(0).unbind()
        return Plain(loss, loss.detach(), [term.detach() for term in terms])

    return losses
