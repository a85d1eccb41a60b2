"""Every family of the registry trains on eight meshes like on one process."""

import functools
from dataclasses import replace

import pytest

from tests.distributed import tiny
from tests.distributed.tiny import Case
from tests.families import FAMILIES, built_in
from tests.parity.table import FULL, TOLERANCE, row
from tests.pool import GlooPool

MESHES = {
    "fsdp": row(shard=2),
    "ddp": row(replicate=2, document_mask=True),
    "tensor": row(tp=2),
    "context": row(cp=2, document_mask=True),
    "pipeline": row(pp=2),
    "fsdp tensor": row(FULL, shard=2, tp=2),
    "tensor context, shared key heads": row(tp=2, cp=2, kv_heads=1),
    "tensor pipeline": row(tp=2, pp=2),
}


def of_family(case: Case, name: str) -> Case:
    """Return `case` with a tiny model of the family."""
    return replace(case, family=name, args=dict(FAMILIES[name].tiny))


@pytest.fixture(scope="module")
def reference(gloo_pool: GlooPool):
    """Return the result of one process."""

    @functools.cache
    def train(name: str, kv_heads: int, document_mask: bool) -> tiny.Result:
        case = row(kv_heads=kv_heads, document_mask=document_mask)
        return gloo_pool.run(1, tiny.train, of_family(case, name))[0]

    return train


@pytest.mark.parametrize("mesh", MESHES)
@pytest.mark.parametrize("name", built_in())
def test_mesh_equals_one_process(name: str, mesh: str, gloo_pool: GlooPool, reference) -> None:
    case = MESHES[mesh]
    results = gloo_pool.run(case.world_size, tiny.train, of_family(case, name))
    difference = tiny.compare(results, reference(name, case.kv_heads, case.document_mask))
    assert difference.worst < TOLERANCE and difference.between_ranks == 0, difference
