"""The losses of the table from PyTorch's own functions, on a model that is not sharded."""

from collections.abc import Callable

import torch
import torch.nn.functional as F
from torch import Tensor, nn

from tests.distributed import tiny
from tests.distributed.tiny import Case
from torchtitan.loss.registry import CrossEntropySettings, DPOSettings, loss_settings
from torchtitan.models.batch import IGNORE_INDEX
from torchtitan.models.registry import get_family
from torchtitan.parallel.initialize import initialize_parameters


def plain_losses(case: Case, model: nn.Module) -> Callable[[], list[Tensor]]:
    """Return what computes the mean loss of the case's data, followed by its terms."""
    settings = loss_settings(case.config().loss)
    if isinstance(settings, DPOSettings):
        return _preference(case, model, settings)
    return _cross_entropy(case, model, settings)


def _forward(case: Case, model: nn.Module) -> Tensor:
    batch = tiny.data_of(case)
    inputs = [batch["tokens"], batch["positions"]] + [batch["document_ids"]] * case.document_mask
    return model.head(model(*inputs))


def _cross_entropy(
    case: Case, model: nn.Module, settings: CrossEntropySettings
) -> Callable[[], list[Tensor]]:
    """What is minimised, and the plain cross entropy where it is something else."""
    labels = tiny.data_of(case)["labels"].flatten()

    def losses() -> list[Tensor]:
        logits = _forward(case, model).flatten(0, 1)
        smoothed = F.cross_entropy(
            logits, labels, ignore_index=IGNORE_INDEX, label_smoothing=settings.label_smoothing
        )
        log_z = logits[labels != IGNORE_INDEX].logsumexp(-1)
        loss = smoothed + settings.z_loss_weight * log_z.square().mean()
        plain = F.cross_entropy(logits, labels, ignore_index=IGNORE_INDEX).detach()
        return [loss] if settings.plain else [loss, plain]

    return losses


def _preference(case: Case, model: nn.Module, settings: DPOSettings) -> Callable[[], list[Tensor]]:
    """The loss, and chosen and rejected rewards, margins and accuracies, pair by pair."""
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

    def losses() -> list[Tensor]:
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
        return [loss, *(term.detach() for term in terms)]

    return losses
