"""Models whose sequences are spread over ranks train like one process, to float64 rounding."""

from typing import Any

import pytest
import torch

from tests.distributed import tiny
from tests.distributed.tiny import Case
from tests.parity.table import BY_OPERATOR, COMPILED, INDUCTOR, PACKED, TOLERANCE, reference_of
from tests.pool import GlooPool
from torchtitan.distributed.context import DistributedContext
from torchtitan.models.batch import Batch
from torchtitan.parallel.context.context_parallel import ContextParallel
from torchtitan.parallel.context.sequence_layout import SequenceLayout


def over(ranks: int, method: str, cp: int, balancer: str = "headtail", **changes: Any) -> Case:
    """A case of one context parallel method."""
    settings = changes.pop("settings", {})
    parallelism = {"context_parallel_method": method, "context_parallel_load_balancer": balancer}
    return Case(ranks, cp=cp, settings={"parallelism": parallelism, **settings}, **changes)


CASES = {
    "allgather on 4": over(4, "allgather", 4),
    "ring on 4": over(4, "ring", 4),
    "ulysses on 4": over(4, "ulysses", 4, "none"),
    "ring, in order": over(4, "ring", 4, "none", **PACKED),
    "ring x hsdp": over(8, "ring", 2, replicate=2, shard=2, microbatches=2, **PACKED),
    "allgather x ddp": over(4, "allgather", 2, replicate=2, shard=1),
    "allgather, compiled": over(2, "allgather", 2, settings=COMPILED | BY_OPERATOR, **PACKED),
    "ulysses, compiled": over(2, "ulysses", 2, "none", settings=COMPILED, **PACKED),
    "ring, by inductor": over(2, "ring", 2, settings=INDUCTOR, **PACKED),
    "ulysses, by inductor": over(2, "ulysses", 2, "none", settings=INDUCTOR, **PACKED),
}
"""Combinations whose parts, but not the whole, are in the parity table."""


NIGHTLY = {"ring, by inductor", "ulysses, by inductor"}
"""By day inductor meets a spread sequence without kernels of its own, below."""


@pytest.mark.parametrize(
    "name",
    [pytest.param(name, marks=[pytest.mark.nightly] * (name in NIGHTLY)) for name in CASES],
)
def test_spread_equals_one_process(name: str, gloo_pool: GlooPool, one_process) -> None:
    case = CASES[name]
    results = gloo_pool.run(case.world_size, tiny.train, case, timeout=240)
    assert tiny.compare(results, one_process(reference_of(case))).worst < TOLERANCE


def train_without_kernels(world: DistributedContext, case: Case) -> tiny.Result:
    """Train with torch's kernels in inductor's graphs: its own take a compiler a minute."""
    with torch._inductor.config.patch(fallback_by_default=True):
        return tiny.train(world, case)


def test_inductor_meets_a_spread_sequence(gloo_pool: GlooPool, one_process) -> None:
    case = CASES["ring, by inductor"]
    results = gloo_pool.run(case.world_size, train_without_kernels, case, timeout=240)
    assert tiny.compare(results, one_process(reference_of(case))).worst < TOLERANCE


def cut(world: DistributedContext, method: str) -> Batch:
    layout = SequenceLayout(world.world_size, method != "ulysses")
    context = ContextParallel(method, layout, world.control_group)
    values = torch.arange(16).view(2, 8)
    batch = Batch(dict.fromkeys(("tokens", "labels", "positions", "document_ids", "new"), values))
    return context.shard_batch(Batch({**batch, "other": torch.arange(8)}))


@pytest.mark.parametrize(
    ("method", "columns"),
    [("ring", [[0, 1, 6, 7], [2, 3, 4, 5]]), ("ulysses", [[0, 1, 2, 3], [4, 5, 6, 7]])],
)
def test_what_is_cut(method: str, columns: list[list[int]], gloo_pool: GlooPool) -> None:
    """All that has a value per position, but the document ids."""
    whole = torch.arange(16).view(2, 8)
    for rank, batch in enumerate(gloo_pool.run(2, cut, method)):
        for name in ("tokens", "labels", "positions", "new"):
            assert torch.equal(batch[name], whole[:, columns[rank]])
        assert torch.equal(batch["document_ids"], whole)
        assert torch.equal(batch["other"], torch.arange(8))
