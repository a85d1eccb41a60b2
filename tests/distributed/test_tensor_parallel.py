"""Tensor parallelism in itself: what is where, what is exchanged, what the compiler meets.

That it starts and trains like one process, on which mesh ever, is for `tests/parity`.
"""

from collections import Counter
from typing import Any

import pytest
import torch
import torch.distributed as dist
from torch import library, nn
from torch.distributed.device_mesh import DeviceMesh
from torch.distributed.tensor import DTensor
from torch.utils._python_dispatch import TorchDispatchMode

from tests.distributed import tiny
from tests.distributed.tiny import VOCAB_SIZE, Case
from tests.parity.table import (
    BY_OPERATOR,
    COMPILED,
    EVERY_SECOND,
    FULL,
    INDUCTOR,
    TOLERANCE,
    parallelism,
    reference_of,
    row,
)
from tests.pool import GlooPool
from torchtitan.distributed.context import DistributedContext
from torchtitan.distributed.parallel_dims import ParallelDims
from torchtitan.models.decoder.model import Decoder
from torchtitan.models.registry import get_family
from torchtitan.models.spec import LanguageModel
from torchtitan.parallel.tensor_parallel import apply_tensor_parallel
from torchtitan.training import builder, model_builder

LAYERS = 2


def build(world: DistributedContext, case: Case) -> tuple[model_builder.BuiltModel, Any]:
    config = case.config()
    dims = ParallelDims.from_section(config.parallelism, world.world_size)
    mesh = dims.build_mesh("cpu")
    model = model_builder.build_model(config, VOCAB_SIZE, mesh, dims, world.device)
    return model, builder.build_runner(config, model, mesh, dims, world.device)


# What is where


def local_shapes(world: DistributedContext, case: Case) -> dict[str, tuple[int, ...]]:
    model, _ = build(world, case)
    parameters = dict(model.parts[0].named_parameters())
    assert all("tp" in tensor.device_mesh.mesh_dim_names for tensor in parameters.values())
    return {name: tuple(tensor.to_local().shape) for name, tensor in parameters.items()}


def test_ranks_hold_their_parts(gloo_pool: GlooPool) -> None:
    """Dim 32, 8 heads, 2 of keys: whole on every rank. 131 tokens: 33, 33, 33 and 32."""
    shapes = gloo_pool.run(4, local_shapes, row(tp=4, kv_heads=2, layers=1))
    assert shapes[0] == {
        "tok_embeddings.weight": (33, 32),
        "layers.0.attention.wq.weight": (8, 32),
        "layers.0.attention.wk.weight": (8, 32),
        "layers.0.attention.wv.weight": (8, 32),
        "layers.0.attention.wo.weight": (32, 8),
        "layers.0.feed_forward.w1.weight": (22, 32),
        "layers.0.feed_forward.w2.weight": (32, 22),
        "layers.0.feed_forward.w3.weight": (22, 32),
        "layers.0.attention_norm.weight": (32,),
        "layers.0.ffn_norm.weight": (32,),
        "norm.weight": (32,),
        "output.weight": (33, 32),
    }
    assert [shape["output.weight"] for shape in shapes] == [(33, 32)] * 3 + [(32, 32)]


def block_inputs(world: DistributedContext) -> list[tuple[int, ...]]:
    model, runner = build(world, row(tp=2))
    seen = []
    part = model.parts[0]
    assert isinstance(part, LanguageModel)
    for block in part.blocks().values():
        block.register_forward_pre_hook(lambda _, args: seen.append(tuple(args[0].shape)))
    runner.forward_backward([tiny.sequences()], 1)
    return seen


def test_the_residual_stream_is_cut_along_the_sequence(gloo_pool: GlooPool) -> None:
    expected = [(tiny.NUM_SEQUENCES, tiny.SEQ_LEN // 2, 32)] * LAYERS
    assert gloo_pool.run(2, block_inputs) == [expected] * 2


def tied_parameters(world: DistributedContext) -> tuple[bool, int]:
    model, mesh = bare_model(tied_embeddings=True)
    apply_tensor_parallel(model, mesh)
    ends = model.get_submodule("tok_embeddings"), model.get_submodule("output")
    first, last = (end._parameters["weight"] for end in ends)
    return first is last, len(list(model.parameters()))


def test_a_tied_matrix_stays_one(gloo_pool: GlooPool) -> None:
    assert gloo_pool.run(2, tied_parameters) == [(True, 9 * 6 + 2)] * 2


def bare_model(**args: Any) -> tuple[nn.Module, DeviceMesh]:
    """On the meta device, and the ranks to cut it over."""
    family = get_family("llama3")
    with torch.device("meta"):
        model = family.build(family.resolve_args("debugmodel", args, 131))
    return model, ParallelDims(tp=2).build_mesh("cpu")["tp"]


def forget_a_norm(world: DistributedContext) -> str:
    plan = Decoder.tensor_parallel_plan
    Decoder.tensor_parallel_plan = lambda self, styles: {  # type: ignore[method-assign]
        name: style for name, style in plan(self, styles).items() if name != "layers.1.ffn_norm"
    }
    try:
        model, mesh = bare_model()
        with pytest.raises(ValueError, match=r"leaves out layers\.1\.ffn_norm\.weight$") as caught:
            apply_tensor_parallel(model, mesh)
        return str(caught.value)
    finally:
        Decoder.tensor_parallel_plan = plan  # type: ignore[method-assign]


def test_no_parameter_may_be_left_out(gloo_pool: GlooPool) -> None:
    assert len(gloo_pool.run(2, forget_a_norm)) == 2


# What is exchanged


class Exchanges(TorchDispatchMode):
    """Counts collectives by name, without FSDP's."""

    def __init__(self) -> None:
        super().__init__()
        self.counts: Counter[str] = Counter()

    def __torch_dispatch__(self, function: Any, types: Any, args: Any = (), kwargs: Any = None):  # type: ignore[no-untyped-def]
        if function in COLLECTIVES:
            self.counts[str(function.overloadpacket).split(".")[-1]] += 1
        return function(*args, **(kwargs or {}))


C10D = torch.ops._c10d_functional
COLLECTIVES = (
    C10D.all_gather_into_tensor.default,
    C10D.reduce_scatter_tensor.default,
    C10D.all_reduce.default,
)


def exchanges(world: DistributedContext, case: Case) -> dict[str, int]:
    _, runner = build(world, case)
    with Exchanges() as exchanges:
        runner.forward_backward(tiny.microbatches_of(case, ParallelDims(tp=2), world.rank), 1)
    return dict(exchanges.counts)


@pytest.mark.parametrize(
    ("settings", "gathers_again", "scatters_again"),
    [({}, 0, 0), (FULL, 2 * LAYERS, LAYERS), (EVERY_SECOND, 2, 1), (BY_OPERATOR, 2 * LAYERS, 0)],
    ids=["none", "full", "every second", "by operator"],
)
@pytest.mark.parametrize("microbatches", [1, 2])
def test_what_is_exchanged(
    settings: dict[str, Any],
    gathers_again: int,
    scatters_again: int,
    microbatches: int,
    gloo_pool: GlooPool,
) -> None:
    """A layer gathers twice and scatters twice, in the forward and in the backward; the embedding
    and the head do so once. By operator nothing is scattered again for the recomputation (nor what
    comes last in a block, by any way). Gradients of the norms are summed once per step."""
    expected = {
        "all_gather_into_tensor": microbatches * (4 * LAYERS + 2 + gathers_again),
        "reduce_scatter_tensor": microbatches * (4 * LAYERS + 2 + scatters_again),
        "all_reduce": 2 * LAYERS + 1,
    }
    case = row(settings, tp=2, microbatches=microbatches)
    assert gloo_pool.run(2, exchanges, case) == [expected] * 2


# What the compiler meets


def train_counting_graphs(world: DistributedContext, case: Case) -> tuple[tiny.Result, int]:
    import torch._dynamo as dynamo

    dynamo.reset()
    dynamo.utils.counters.clear()
    result = tiny.train(world, case)
    return result, dynamo.utils.counters["stats"]["unique_graphs"]


@pytest.mark.parametrize(
    "case",
    [
        row(COMPILED, tp=2, layers=3),
        row(COMPILED, FULL, tp=4, layers=3, kv_heads=2),
        row(COMPILED, BY_OPERATOR, tp=2, layers=3, document_mask=True),
        pytest.param(
            row(INDUCTOR, BY_OPERATOR, tp=2, layers=3, document_mask=True),
            marks=pytest.mark.nightly,
        ),
    ],
    ids=["alone", "full checkpointing", "by operator", "inductor by operator"],
)
def test_blocks_compile_once(case: Case, gloo_pool: GlooPool, one_process) -> None:
    """One graph for training and one for evaluation serve all blocks."""
    answers = gloo_pool.run(case.world_size, train_counting_graphs, case, timeout=120)
    expected = one_process(reference_of(case))
    assert tiny.compare([result for result, _ in answers], expected).worst < TOLERANCE
    assert [graphs for _, graphs in answers] == [2] * case.world_size


def train_overlapping(world: DistributedContext, case: Case) -> tuple[tiny.Result, Counter[str]]:
    """CPUs have no kernels of the fused operators, so they get torch's slow ones for comparison."""
    from torch.distributed import _symmetric_memory as symmetric_memory

    calls: Counter[str] = Counter()

    def counted(name: str) -> Any:
        def slow(*args: Any, **kwargs: Any) -> Any:
            calls[name] += 1
            return getattr(symmetric_memory, f"_{name}_fallback")(*args, **kwargs)

        return slow

    fragment = library.Library("symm_mem", "IMPL")
    for name in ("fused_all_gather_matmul", "fused_matmul_reduce_scatter"):
        fragment.impl(name, counted(name), "CPU")
    dist.is_nccl_available = lambda: True  # the compiler asks
    torch._inductor.config.force_disable_caches = True  # they ignore which groups are enabled
    torch._inductor.config.fallback_by_default = True  # no kernels of its own, which take a minute
    return tiny.train(world, case), calls


def test_exchanges_overlap(one_process) -> None:
    """Each exchange of a forward is fused with the products before or after it: two gathers and
    two scatters, in every step and in the evaluation. Of the backward's the gathers are."""
    pool = GlooPool()  # of its own: its processes are changed for good
    try:
        case = row(INDUCTOR, parallelism(enable_async_tensor_parallel=True), tp=2, layers=1)
        answers = pool.run(2, train_overlapping, case, timeout=120)
    finally:
        pool.close()
    results = [result for result, _ in answers]
    assert tiny.compare(results, one_process(reference_of(case))).worst < TOLERANCE
    for _, calls in answers:
        assert calls["fused_all_gather_matmul"] >= 2 * (2 * tiny.NUM_STEPS + 1)
        assert calls["fused_matmul_reduce_scatter"] >= 2 * (tiny.NUM_STEPS + 1)


def test_parameters_that_are_cut_know_it(gloo_pool: GlooPool) -> None:
    """FSDP's shards of tensor parallelism's parts, as DTensors that checkpoints understand."""
    [kinds, *_] = gloo_pool.run(4, placements, row(shard=2, tp=2))
    assert kinds == {"_StridedShard Shard", "Shard Shard", "Shard Replicate"}


def placements(world: DistributedContext, case: Case) -> set[str]:
    model, _ = build(world, case)
    tensors = [tensor for tensor in model.parameters if isinstance(tensor, DTensor)]
    assert len(tensors) == len(model.parameters)
    return {" ".join(type(each).__name__ for each in tensor.placements) for tensor in tensors}
