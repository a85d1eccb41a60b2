"""A handler that adds parameters to linears (see docs/handlers.md), on meshes that cut them."""

from dataclasses import replace
from typing import Any

import pytest
import torch
import torch.nn.functional as F
from torch import Tensor, nn

from tests.distributed import tiny
from tests.distributed.tiny import Case
from tests.parity.table import COMPILED, FULL, TOLERANCE, row
from tests.pool import GlooPool
from torchtitan.distributed.world import World
from torchtitan.handlers.registry import HANDLERS, register_handler
from torchtitan.models.spec import InitRule

RANK = 3


class LowRankLinear(nn.Linear):
    lora_a: Tensor
    lora_b: Tensor

    def forward(self, input: Tensor) -> Tensor:
        return super().forward(input) + F.linear(F.linear(input, self.lora_a), self.lora_b)


class LowRank:
    """On a matrix that is cut by columns, one that ranks share, and one that is cut by rows."""

    def __init__(self, *_: object) -> None: ...

    def convert(self, model: Any) -> None:
        for block in model.blocks().values():
            for linear in (block.attention.wq, block.attention.wk, block.attention.wo):
                linear.__class__ = LowRankLinear
                linear.lora_a = nn.Parameter(torch.empty(RANK, linear.in_features))
                linear.lora_b = nn.Parameter(torch.empty(linear.out_features, RANK))

    def init_rule(self, name: str) -> InitRule | None:
        return InitRule("normal", std=0.1) if "lora" in name else None

    def extend_tp_plan(self, plan: dict[str, Any]) -> None:
        for name, style in plan.items():
            if name.endswith((".wq", ".wk")):
                plan[name] = replace(style, whole=("lora_a",))
            elif name.endswith(".wo"):
                plan[name] = replace(style, whole=("lora_b",))

    def pre_optimizer_hook(self, model: object) -> None: ...

    post_optimizer_hook = pre_optimizer_hook


def train(world: World, case: Case) -> tiny.Result:
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
