"""Every family of the registry trains on eight meshes like on one process.

The parity table has these meshes, and many more, for its own family.
"""

from dataclasses import replace

import pytest

from tests.distributed import tiny
from tests.distributed.tiny import Case
from tests.families import FAMILIES, built_in
from tests.parity.table import FULL, TOLERANCE, reference_of, row
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


@pytest.mark.parametrize("name", [name for name in built_in() if name != Case.family])
@pytest.mark.parametrize("mesh", MESHES)
def test_mesh_equals_one_process(name: str, mesh: str, gloo_pool: GlooPool, one_process) -> None:
    case = of_family(MESHES[mesh], name)
    results = gloo_pool.run(case.world_size, tiny.train, case, keep=mesh)
    difference = tiny.compare(results, one_process(reference_of(case)))
    assert difference.worst < TOLERANCE and difference.between_ranks == 0, difference
