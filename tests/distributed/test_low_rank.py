"""A handler that adds parameters to linears (docs/guides/own_handler.md), on meshes that cut them."""

from typing import Any

import pytest

from tests.distributed import tiny
from tests.distributed.own_models import LOW_RANK_RULE, add_low_rank, keep_low_rank_whole
from tests.distributed.tiny import Case
from tests.parity.table import COMPILED, FULL, TOLERANCE, row
from tests.pool import GlooPool
from torchtitan.distributed.context import DistributedContext
from torchtitan.handlers.base import ModelHandler
from torchtitan.handlers.registry import HANDLERS, register_handler
from torchtitan.models.spec import InitRule


class LowRank(ModelHandler):
    def convert(self, model: Any) -> None:
        add_low_rank(model)

    def init_rule(self, name: str) -> InitRule | None:
        return LOW_RANK_RULE if "lora" in name else None

    def extend_tp_plan(self, plan: dict[str, Any]) -> None:
        keep_low_rank_whole(plan)


def train(world: DistributedContext, case: Case) -> tiny.Result:
    if "low_rank" not in HANDLERS:  # in a rank's process only, where no other test looks
        register_handler("low_rank")(LowRank)
    return tiny.train(world, case)


ADDED = {"model": {"handlers": ["low_rank"]}}


@pytest.mark.parametrize(
    "case",
    [
        row(ADDED, tp=4, kv_heads=2, microbatches=2),
        row(ADDED, COMPILED, FULL, shard=2, tp=2, kv_heads=2),
    ],
    ids=["keys shared by ranks", "compiled"],
)
def test_meshes_agree(case: Case, gloo_pool: GlooPool) -> None:
    [one] = gloo_pool.run(1, train, Case(kv_heads=2, settings=ADDED))
    ranks = gloo_pool.run(case.world_size, train, case, timeout=120)
    difference = tiny.compare(ranks, one)
    assert difference.worst < TOLERANCE and difference.between_ranks == 0, difference
