"""Every data mesh trains like one process: losses, norms and weights, to float64 rounding."""

import pytest
import torch

from tests.distributed import tiny
from tests.distributed.tiny import Case
from tests.pool import GlooPool
from torchtitan.distributed import data_parallel, runner
from torchtitan.distributed.world import World

TOLERANCE = 1e-11

CASES = {
    "one process, accumulating": Case(microbatches=4),
    "one process, logits whole": Case(loss_chunks=1),
    "one process, by units": Case(
        microbatches=2, settings={"parallelism": {"fsdp_reshard_after_forward": "always"}}
    ),
    "fsdp": Case(2),
    "fsdp, accumulating": Case(2, microbatches=2),
    "fsdp on 4": Case(4, microbatches=2),
    "ddp": Case(2, replicate=2, shard=1),
    "ddp, accumulating": Case(2, replicate=2, shard=1, microbatches=2),
    "hsdp": Case(4, replicate=2, shard=2),
    "hsdp, accumulating": Case(4, replicate=2, shard=2, microbatches=2),
    "never resharded": Case(2, settings={"parallelism": {"fsdp_reshard_after_forward": "never"}}),
    "full checkpointing": Case(2, settings={"activation_checkpoint": {"mode": "full"}}),
    "every second block": Case(
        settings={"activation_checkpoint": {"mode": "selective", "selective_ac_option": "2"}}
    ),
    "by operator": Case(
        2, settings={"activation_checkpoint": {"mode": "selective", "selective_ac_option": "op"}}
    ),
    "compiled": Case(
        2,
        settings={
            "model": {"handlers": ["compile"]},
            "handlers": {"compile": {"backend": "aot_eager"}},
            "activation_checkpoint": {"mode": "full"},
        },
    ),
}
VARIANTS = {
    "plain": {},
    "tied": {"tied": True},
    "packed documents": {"document_mask": True},
}
OF_VARIANTS = ("fsdp, accumulating", "ddp", "hsdp", "by operator")


@pytest.fixture(scope="module")
def references(gloo_pool: GlooPool) -> dict[str, tiny.Result]:
    return {
        name: gloo_pool.run(1, tiny.train, Case(**variant))[0] for name, variant in VARIANTS.items()
    }


@pytest.mark.parametrize("name", CASES)
def test_mesh_equals_one_process(
    name: str, gloo_pool: GlooPool, references: dict[str, tiny.Result]
) -> None:
    case = CASES[name]
    results = gloo_pool.run(case.world_size, tiny.train, case, timeout=120)
    assert tiny.compare(results, references["plain"]).worst < TOLERANCE


@pytest.mark.parametrize("variant", ["tied", "packed documents"])
@pytest.mark.parametrize("name", OF_VARIANTS)
def test_variant_equals_one_process(
    name: str, variant: str, gloo_pool: GlooPool, references: dict[str, tiny.Result]
) -> None:
    case = Case(**{**CASES[name].__dict__, **VARIANTS[variant]})
    results = gloo_pool.run(case.world_size, tiny.train, case, timeout=120)
    assert tiny.compare(results, references[variant]).worst < TOLERANCE


def test_variants_differ(references: dict[str, tiny.Result]) -> None:
    """Else the comparisons above would compare the same thing three times."""
    losses = [result.losses[0] for result in references.values()]
    assert len(set(losses)) == len(losses)


def _train_averaging(world: World, case: Case) -> tiny.Result:
    data_parallel.sum_gradients = lambda model: None  # type: ignore[assignment]
    return tiny.train(world, case)


def _train_mean_per_rank(world: World, case: Case) -> tiny.Result:
    original = runner.WholeModelRunner.forward_backward

    def per_rank(self: runner.WholeModelRunner, batches, num_targets):  # type: ignore[no-untyped-def]
        own = sum(int(self.loss.count(batch)) for batch in batches)
        return original(self, batches, own * world.world_size)

    runner.WholeModelRunner.forward_backward = per_rank  # type: ignore[method-assign]
    return tiny.train(world, case)


def _train_syncing_first(world: World, case: Case) -> tiny.Result:
    runner.set_gradient_sync = lambda model, enabled: data_parallel.set_gradient_sync(
        model, not enabled
    )
    return tiny.train(world, case)


@pytest.mark.parametrize("mistake", [_train_averaging, _train_mean_per_rank, _train_syncing_first])
def test_comparison_catches_mistakes(mistake, references: dict[str, tiny.Result]) -> None:  # type: ignore[no-untyped-def]
    pool = GlooPool()  # of its own: its processes are changed for good
    try:
        results = pool.run(2, mistake, Case(2, microbatches=2))
    finally:
        pool.close()
    assert tiny.compare(results, references["plain"]).worst > 1e-4


def test_gradients_of_uneven_shards_have_one_norm(gloo_pool: GlooPool) -> None:
    """131 rows over 4 ranks: shards of 33, 33, 33 and 32."""
    norms = gloo_pool.run(4, _norm_of_known_gradients)
    expected = torch.arange(131 * 3, dtype=torch.float64).norm().item()
    assert norms == pytest.approx([expected] * 4, rel=1e-14)


def _norm_of_known_gradients(world: World) -> float:
    from torch.distributed.device_mesh import init_device_mesh
    from torch.distributed.tensor import Replicate, Shard, distribute_tensor

    from torchtitan.distributed.grad_clip import gradient_norm

    whole = torch.arange(131 * 3, dtype=torch.float64).view(131, 3)
    mesh = init_device_mesh("cpu", (2, 2), mesh_dim_names=("replicate", "shard"))
    half = mesh["shard"]
    parameters = []
    for rows, device_mesh, placements in (
        (whole[:50], mesh, [Replicate(), Shard(0)]),
        (whole[50:90], half, [Shard(0)]),
        (whole[90:], mesh, [Replicate(), Replicate()]),
    ):
        tensor = distribute_tensor(rows, device_mesh, placements)
        parameter = torch.nn.Parameter(torch.zeros_like(tensor))
        parameter.grad = tensor
        parameters.append(parameter)
    return gradient_norm(parameters, world.world_size).item()
