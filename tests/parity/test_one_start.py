"""One start everywhere: the same initial weights on every mesh, and nobody builds them whole."""

import hashlib

import pytest
from torch import Tensor, nn
from torch.distributed.tensor import DTensor

from tests.distributed.tiny import VOCAB_SIZE, Case
from tests.parity.table import TIED, name_of, row
from tests.pool import GlooPool
from torchtitan import builder
from torchtitan.config.facts import Facts
from torchtitan.distributed.initialize import initialize_parameters
from torchtitan.distributed.parallel_dims import ParallelDims
from torchtitan.distributed.world import World

V, LOOP = {"schedule": "ZBVZeroBubble"}, {"schedule": "Interleaved1F1B"}
FOUR = {"layers": 4}
# Rows that a vocabulary of 129 tokens has over 2 ranks, 65 and 64, differ in how they go over 4:
# the fourth has none of the one, and 16 of the other.
UNLIKE = 129
MESHES = [
    row(shard=2, **TIED),
    row(shard=3),
    row(shard=4),
    row(replicate=2),
    row(replicate=2, shard=2, **TIED),
    row(tp=2, **TIED),
    row(tp=4),
    row(tp=8, kv_heads=2),
    row(shard=2, tp=2),
    row(shard=2, tp=4),
    row(replicate=2, shard=2, tp=2, **TIED),
    row(replicate=2, tp=2),
    row(cp=2),
    row(shard=2, cp=2, tp=2, **TIED),
    row(pp=2, **V, **FOUR),
    row(pp=2, **LOOP, **FOUR),
    row(pp=4, schedule="1F1B", **FOUR),
    row(shard=2, cp=2, tp=2, pp=2, schedule="1F1B"),
]


def build(world: World, case: Case, vocab_size: int) -> builder.BuiltModel:
    config = case.config()
    dims = ParallelDims.from_facts(Facts(config, world.world_size, "cpu"))
    mesh = dims.build_mesh("cpu")
    return builder.build_model(config, vocab_size, mesh, dims, world.device)


def named_parameters(model: builder.BuiltModel) -> list[tuple[str, nn.Parameter]]:
    return [named for part in model.parts for named in part.named_parameters()]


def digest(tensor: Tensor) -> str:
    """Of the whole tensor; collective among the ranks that hold it."""
    whole = tensor.full_tensor() if isinstance(tensor, DTensor) else tensor
    return hashlib.sha256(whole.detach().contiguous().numpy().tobytes()).hexdigest()


def digests(world: World, case: Case, vocab_size: int) -> tuple[dict[str, str], int]:
    """Of this rank's parameters; and how many it holds no element of."""
    parameters = named_parameters(build(world, case, vocab_size))
    empty = sum(tensor.to_local().numel() == 0 for _, tensor in parameters)  # type: ignore[attr-defined]
    return {name: digest(tensor) for name, tensor in parameters}, empty


def whole_digests(world: World, case: Case, vocab_size: int) -> dict[str, str]:
    """Of a model that no part of the library but the initialisation has touched."""
    config = case.config()
    family = builder.get_family("llama3")
    args = family.resolve_args(config.model.flavor, config.model.args, vocab_size)
    model = family.build(args).double()
    initialize_parameters(model, model.init_rule, config.debug.seed)  # type: ignore[arg-type]
    return {name: digest(tensor) for name, tensor in model.named_parameters()}


def same_start(pool: GlooPool, case: Case, vocab_size: int = VOCAB_SIZE) -> int:
    """The number of empty shards."""
    [expected] = pool.run(1, whole_digests, case, vocab_size)
    found = pool.run(case.world_size, digests, case, vocab_size)
    for held, _ in found:
        assert held.items() <= expected.items()
    assert set().union(*(held for held, _ in found)) == expected.keys()
    return sum(empty for _, empty in found)


@pytest.mark.parametrize("case", MESHES, ids=name_of)
def test_every_mesh_starts_from_the_same_bits(case: Case, gloo_pool: GlooPool) -> None:
    same_start(gloo_pool, case)


def test_ranks_that_hold_nothing_of_a_parameter(gloo_pool: GlooPool) -> None:
    """9 rows over 8 ranks are 2 on each of four, then 1, then none."""
    assert same_start(gloo_pool, row(shard=8), vocab_size=9) == 2 * 3


@pytest.mark.parametrize("case", [row(shard=4, tp=2), row(shard=4, tp=2, **TIED)], ids=name_of)
def test_rows_of_the_vocabulary_cut_unevenly_twice(case: Case, gloo_pool: GlooPool) -> None:
    same_start(gloo_pool, case, UNLIKE)
