"""The promise: every mesh trains like one process.

Losses, gradient norms and the evaluated loss, every parameter and both moments of the optimizer
after the last step, all in float64, on every rank.
"""

import pytest
import torch
import torch.nn.functional as F
from torch import nn

from tests.distributed import tiny
from tests.distributed.tiny import Case
from tests.parity.table import TABLE, TOLERANCE, name_of, reference_of
from tests.pool import GlooPool
from torchtitan.components.loss_registry import loss_settings
from torchtitan.config.facts import Facts
from torchtitan.config.training_sections import Optimizer
from torchtitan.distributed.initialize import initialize_parameters
from torchtitan.models.batch import IGNORE_INDEX
from torchtitan.models.registry import get_family
from torchtitan.preflight import ARITHMETIC, errors_of, preflight

REFERENCES = list({name_of(reference_of(case)): reference_of(case) for case in TABLE}.values())


@pytest.fixture(scope="module")
def reference(gloo_pool: GlooPool):
    """What one process has of a row's model."""
    results = {}

    def train(case: Case) -> tiny.Result:
        name = name_of(case)
        if name not in results:
            results[name] = gloo_pool.run(1, tiny.train, case)[0]
        return results[name]

    return train


@pytest.mark.parametrize("case", TABLE, ids=name_of)
def test_mesh_equals_one_process(case: Case, gloo_pool: GlooPool, reference) -> None:
    results = gloo_pool.run(case.world_size, tiny.train, case, timeout=120)
    difference = tiny.compare(results, reference(reference_of(case)))
    assert difference.worst < TOLERANCE, difference
    assert difference.between_ranks == 0, difference


@pytest.mark.parametrize("case", TABLE, ids=name_of)
def test_a_user_may_configure_it(case: Case) -> None:
    facts = Facts(case.config(), case.world_size, "cpu")
    assert errors_of(preflight(facts, [ARITHMETIC])) == []


@pytest.mark.parametrize("case", REFERENCES, ids=name_of)
def test_one_process_equals_a_plain_loop(case: Case, reference) -> None:
    """Of PyTorch's own parts: else all rows could be wrong alike."""
    config = case.config()
    family = get_family("llama3")
    args = family.resolve(config.model, tiny.VOCAB_SIZE)
    model = family.build(args).double()
    initialize_parameters(model, model.init_rule, config.debug.seed)
    optimizer = _adamw(model, config.optimizer)
    batch, result = tiny.sequences(), tiny.Result()
    inputs = [batch["tokens"], batch["positions"]] + [batch["document_ids"]] * case.document_mask

    labels, settings = batch["labels"].flatten(), loss_settings(config.loss)

    def mean_losses() -> tuple[torch.Tensor, torch.Tensor]:
        """What is minimised, and the plain cross entropy."""
        logits = model.head(model(*inputs)).flatten(0, 1)
        smoothed = F.cross_entropy(
            logits, labels, ignore_index=IGNORE_INDEX, label_smoothing=settings.label_smoothing
        )
        log_z = logits[labels != IGNORE_INDEX].logsumexp(-1)
        loss = smoothed + settings.z_loss_weight * log_z.square().mean()
        return loss, F.cross_entropy(logits, labels, ignore_index=IGNORE_INDEX)

    for _ in range(tiny.NUM_STEPS):
        loss, plain = mean_losses()
        loss.backward()
        norm = torch.nn.utils.clip_grad_norm_(model.parameters(), tiny.MAX_NORM)
        optimizer.step()
        optimizer.zero_grad()
        result.losses += [loss.item()] if settings.plain else [loss.item(), plain.item()]
        result.norms.append(norm.item())
    result.evaluated = mean_losses()[1].item()
    tiny.collect([model], [optimizer], result)
    assert tiny.compare([reference(case)], result).worst < TOLERANCE
    assert min(result.norms) > tiny.MAX_NORM, "nothing is clipped"


def _adamw(model: nn.Module, settings: Optimizer) -> torch.optim.AdamW:
    """Norms have no weight decay."""
    norms = [tensor for name, tensor in model.named_parameters() if name.endswith("norm.weight")]
    others = [tensor for tensor in model.parameters() if tensor.dim() > 1]
    groups = [{"params": others}, {"params": norms, "weight_decay": 0.0}]
    return torch.optim.AdamW(
        groups if norms else groups[:1],
        lr=settings.lr,
        betas=(settings.beta1, settings.beta2),
        eps=settings.eps,
        weight_decay=settings.weight_decay,
    )


def test_the_references_differ(reference) -> None:
    """Else rows would be compared with the wrong one unnoticed."""
    losses = [reference(case).losses[0] for case in REFERENCES]
    assert len(set(losses)) == len(losses) > 3
