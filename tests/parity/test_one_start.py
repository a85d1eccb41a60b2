"""One start everywhere: the same initial weights on every mesh, and nobody builds them whole."""

from collections import Counter
from dataclasses import dataclass
from typing import Any

import pytest
import torch
from torch import Tensor, nn
from torch.distributed.tensor import DTensor
from torch.utils._python_dispatch import TorchDispatchMode
from torch.utils._pytree import tree_leaves

from tests.distributed.tiny import VOCAB_SIZE, Case
from tests.faults.saving import digest
from tests.parity.table import TIED, name_of, row
from tests.pool import GlooPool
from torchtitan.distributed.context import DistributedContext
from torchtitan.distributed.parallel_dims import ParallelDims
from torchtitan.models.registry import get_family
from torchtitan.models.spec import InitRule
from torchtitan.parallel import initialize
from torchtitan.parallel.initialize import initialize_parameters
from torchtitan.training import model_builder

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


def build(
    world: DistributedContext, case: Case, vocab_size: int = VOCAB_SIZE, initialise: bool = True
) -> model_builder.BuiltModel:
    config = case.config()
    dims = ParallelDims.from_section(config.parallelism, world.world_size)
    mesh = dims.build_mesh("cpu")
    return model_builder.build_model(config, vocab_size, mesh, dims, world.device, initialise)


def named_parameters(model: model_builder.BuiltModel) -> list[tuple[str, nn.Parameter]]:
    return [named for part in model.parts for named in part.named_parameters()]


def digests(world: DistributedContext, case: Case, vocab_size: int) -> tuple[dict[str, str], int]:
    """Of this rank's parameters; and how many it holds no element of."""
    parameters = named_parameters(build(world, case, vocab_size))
    empty = sum(tensor.to_local().numel() == 0 for _, tensor in parameters)  # type: ignore[attr-defined]
    return {name: digest(tensor) for name, tensor in parameters}, empty


def whole_digests(world: DistributedContext, case: Case, vocab_size: int) -> dict[str, str]:
    """Of a model that no part of the library but the initialisation has touched."""
    config = case.config()
    family = get_family("llama3")
    args = family.resolve(config.model, vocab_size)
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


# --- nobody builds a whole parameter --------------------------------------------------------------


class Watch(TorchDispatchMode):
    """Notes what is made in memory, and what is communicated, while each parameter is filled."""

    def __init__(self) -> None:
        super().__init__()
        self.name = ""
        """Of the parameter that is being filled."""
        self.largest: Counter[str] = Counter()
        """Elements of the largest memory that was made."""
        self.computed: Counter[str] = Counter()
        """Normally distributed values that were computed."""
        self.communication: list[str] = []

    def __torch_dispatch__(self, func: Any, types: Any, args: Any = (), kwargs: Any = None) -> Any:
        if any(issubclass(kind, DTensor) for kind in types):
            return NotImplemented  # it will do something to plain tensors, which is seen then
        results = func(*args, **(kwargs or {}))
        if "c10d" in func.namespace:
            self.communication.append(str(func))
        known = {tensor.untyped_storage().data_ptr() for tensor in plain_tensors((args, kwargs))}
        for tensor in plain_tensors(results):
            memory = tensor.untyped_storage()
            size = 0 if memory.data_ptr() in known else memory.nbytes() // tensor.itemsize
            self.largest[self.name] = max(self.largest[self.name], size)
            self.computed[self.name] += tensor.numel() * (func is torch.ops.aten.erfinv.default)
        return results


def plain_tensors(values: Any) -> list[Tensor]:
    """Those that are in memory: neither fake, nor made of others."""
    tensors = [value for value in tree_leaves(values) if type(value) in (Tensor, nn.Parameter)]
    return [tensor for tensor in tensors if not tensor.is_meta]


@dataclass(frozen=True)
class Filling:
    """What a rank did to fill a parameter; all are numbers of elements."""

    whole: int
    held: int
    largest: int
    computed: int


def fill_watched(
    world: DistributedContext, case: Case, whole: bool = False
) -> tuple[dict[str, Filling], int, list[str]]:
    """How each parameter was filled, the largest memory when the model was built, what was sent."""
    fill_normal = initialize._fill_normal
    watch = Watch()
    with watch:
        model = build(world, case, initialise=False)

        def rule(name: str) -> InitRule:
            watch.name = name
            return model.parts[0].init_rule(name)  # type: ignore[operator]

        if whole:
            initialize._fill_normal = _fill_whole
        for part in model.parts:
            initialize_parameters(part, rule, seed=0)
    initialize._fill_normal = fill_normal
    fillings = {
        name: Filling(
            tensor.numel(), tensor.to_local().numel(), watch.largest[name], watch.computed[name]
        )
        for name, tensor in named_parameters(model)
    }
    return fillings, watch.largest[""], watch.communication


def _fill_whole(tensor: Tensor, init: InitRule, key: int) -> None:
    """What `initialize` does not do."""
    for chunk, indices in initialize.indexed_chunks(tensor):
        values = initialize._normal(torch.arange(VOCAB_SIZE * 32), init, key)
        chunk.copy_(values[indices].view(chunk.shape))


WATCHED = [
    row(shard=4),
    row(shard=2, tp=2, **TIED),
    row(cp=2, tp=2),
    row(replicate=2, shard=2, pp=2, schedule="1F1B"),
]


@pytest.mark.parametrize("case", WATCHED, ids=name_of)
def test_nobody_builds_a_whole_parameter(case: Case, gloo_pool: GlooPool) -> None:
    """Or computes a value that it does not hold, or asks another rank for one."""
    ranks = gloo_pool.run(case.world_size, fill_watched, case)
    assert max(built for _, built, _ in ranks) == max(
        filling.held for fillings, _, _ in ranks for filling in fillings.values()
    )
    for fillings, _, communication in ranks:
        assert communication == []
        for name, filling in fillings.items():
            assert filling.whole < initialize._CHUNK, "what is whole would be made in parts"
            if not name.endswith("norm.weight"):
                assert filling.held <= filling.largest < filling.whole
                assert filling.computed == filling.held


def test_who_builds_a_whole_parameter_is_seen(gloo_pool: GlooPool) -> None:
    for fillings, _, _ in gloo_pool.run(2, fill_watched, row(shard=2), True):
        assert fillings["tok_embeddings.weight"].largest >= VOCAB_SIZE * 32
        assert fillings["layers.0.attention.wq.weight"].computed == VOCAB_SIZE * 32
