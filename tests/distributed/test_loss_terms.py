"""What a loss logs beside itself counts targets only, and is there when it is declared."""

from typing import Any

import pytest
import torch
import torch.nn.functional as F
from torch import Tensor

from tests.distributed.tiny import Case, Result, train
from tests.pool import GlooPool
from torchtitan.config.schema import Section
from torchtitan.distributed.context import DistributedContext
from torchtitan.loss.chunked import ChunkedLoss
from torchtitan.loss.registry import register_loss


@register_loss("tests.halves")
class Halves(ChunkedLoss):
    """The cross entropy as the sum of two terms."""

    class Settings(Section):
        reports: str = "half other_half"
        summed: bool = False

    terms = ("half", "other_half")

    def token_losses(self, logits: Tensor, labels: Tensor) -> Tensor:
        losses = F.cross_entropy(logits, labels, reduction="none")
        for name in self.settings.reports.split():
            self.report(name, 0.5 * losses.sum() if self.settings.summed else 0.5 * losses)
        return losses


def halves(**args: Any) -> dict[str, dict[str, Any]]:
    return {"loss": {"name": "tests.halves", "args": args}}


def train_halves(world: DistributedContext, case: Case) -> Result:
    return train(world, case)


def error_of_halves(world: DistributedContext, case: Case) -> str:
    with pytest.raises(ValueError) as error:
        train(world, case)
    return str(error.value)


@pytest.mark.parametrize(
    "mesh",
    [
        {"microbatches": 2},
        {"world_size": 2, "tp": 2},
        {"world_size": 2, "cp": 2},
        {"world_size": 2, "pp": 2, "microbatches": 2},
    ],
    ids=str,
)
def test_terms_are_of_targets(gloo_pool: GlooPool, mesh: dict[str, Any]) -> None:
    """The data have positions that are no targets, more in some microbatches than in others."""
    case = Case(document_mask=True, settings=halves(), **mesh)
    for result in gloo_pool.run(case.world_size, train_halves, case):
        for loss, half, other in zip(*[iter(result.losses)] * 3, strict=True):
            assert half == pytest.approx(loss / 2, rel=1e-12)
            assert other == pytest.approx(loss / 2, rel=1e-12)


@pytest.mark.parametrize(
    ("args", "words"),
    [
        ({"reports": "half"}, "declares terms that it did not report in this step: other_h"),
        ({"reports": "half third"}, "reports third; its `terms` are: half, other_half"),
        ({"summed": True}, "report('half'): [] instead of ["),
    ],
)
def test_wrong_terms_are_errors(gloo_pool: GlooPool, args: dict[str, Any], words: str) -> None:
    (error,) = gloo_pool.run(1, error_of_halves, Case(settings=halves(**args)))
    assert words in error


def test_a_scalar_outside_of_the_tokens_is_a_sum() -> None:
    loss = Halves(Halves.Settings())
    for value in (2.0, 3.0):
        loss.report("half", torch.tensor(value))
    assert loss.take_terms() == {"half": torch.tensor(5.0)}
    with pytest.raises(ValueError, match=r"\[3\] instead of a scalar, a sum over targets"):
        loss.report("half", torch.ones(3))
