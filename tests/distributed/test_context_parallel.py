"""Models whose sequences are spread over ranks train like one process, to float64 rounding."""

from dataclasses import replace
from typing import Any

import pytest
import torch

from tests.distributed import tiny
from tests.distributed.tiny import Case
from tests.pool import GlooPool
from torchtitan.distributed.context import DistributedContext
from torchtitan.models.batch import Batch
from torchtitan.parallel.context.context_parallel import ContextParallel
from torchtitan.parallel.context.sequence_layout import SequenceLayout

TOLERANCE = 1e-11
METHODS = ("allgather", "ring", "ulysses")


def over(ranks: int, method: str, cp: int, balancer: str = "headtail", **changes: Any) -> Case:
    """A case of one context parallel method."""
    settings = changes.pop("settings", {})
    parallelism = {"context_parallel_method": method, "context_parallel_load_balancer": balancer}
    return Case(ranks, cp=cp, settings={"parallelism": parallelism, **settings}, **changes)


COMPILED = {"model": {"handlers": ["compile"]}, "handlers": {"compile": {"backend": "aot_eager"}}}
INDUCTOR = {"model": {"handlers": ["compile"]}, "handlers": {"compile": {"backend": "inductor"}}}
FULL = {"activation_checkpoint": {"mode": "full"}}
BY_OPERATOR = {"activation_checkpoint": {"mode": "selective", "selective_ac_option": "op"}}
EVERY_SECOND = {"activation_checkpoint": {"mode": "selective", "selective_ac_option": "2"}}

CASES = {
    **{f"{method} on 2": over(2, method, 2) for method in METHODS},
    **{f"{method} on 4": over(4, method, 4) for method in METHODS},
    "allgather, in order": over(4, "allgather", 4, "none"),
    "ring, in order": over(4, "ring", 4, "none"),
    "allgather x fsdp": over(4, "allgather", 2, microbatches=2),
    "ring x fsdp": over(4, "ring", 2, settings=FULL),
    "ring x hsdp": over(8, "ring", 2, replicate=2, shard=2, microbatches=2),
    "allgather x ddp": over(4, "allgather", 2, replicate=2, shard=1),
    "ulysses x ddp": over(4, "ulysses", 2, replicate=2, shard=1, microbatches=2),
    "ring, by operator": over(2, "ring", 2, settings=BY_OPERATOR),
    "ulysses, by operator": over(2, "ulysses", 2, settings=BY_OPERATOR),
    "allgather, every second block": over(2, "allgather", 2, settings=EVERY_SECOND),
    "ring, compiled": over(2, "ring", 2, settings={**COMPILED, **FULL}),
    "allgather, compiled": over(2, "allgather", 2, settings={**COMPILED, **BY_OPERATOR}),
    "ulysses, compiled": over(2, "ulysses", 2, settings=COMPILED),
}


@pytest.fixture(scope="module")
def references(gloo_pool: GlooPool) -> dict[bool, list[tiny.Result]]:
    """Without and with documents."""
    return {
        documents: gloo_pool.run(1, tiny.train, Case(document_mask=documents))
        for documents in (False, True)
    }


@pytest.mark.parametrize("documents", [False, True], ids=["plain", "packed documents"])
@pytest.mark.parametrize("name", CASES)
def test_spread_equals_one_process(
    name: str, documents: bool, gloo_pool: GlooPool, references: dict[bool, list[tiny.Result]]
) -> None:
    case = replace(CASES[name], document_mask=documents)
    results = gloo_pool.run(case.world_size, tiny.train, case, timeout=120)
    assert tiny.compare(results, references[documents][0]).worst < TOLERANCE


@pytest.mark.parametrize("method", ["ring", "ulysses"])
def test_compiled_by_inductor(
    method: str, gloo_pool: GlooPool, references: dict[bool, list[tiny.Result]]
) -> None:
    case = over(2, method, 2, settings=INDUCTOR, document_mask=True)
    results = gloo_pool.run(2, tiny.train, case, timeout=240)
    assert tiny.compare(results, references[True][0]).worst < TOLERANCE


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
