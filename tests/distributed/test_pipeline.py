"""A model cut into stages trains like one process, whatever the schedule; and evaluates."""

from pathlib import Path

import pytest
import torch
from torch import Tensor
from torch.distributed.tensor import DTensor

from tests.distributed import tiny
from tests.distributed.tiny import Case
from tests.parity.bugs import Patches
from tests.parity.table import FULL, TOLERANCE, parallelism, reference_of
from tests.pool import GlooPool
from torchtitan.checkpoint.state import model_tensors
from torchtitan.config.run_context import RunContext
from torchtitan.distributed.context import DistributedContext
from torchtitan.distributed.parallel_dims import ParallelDims
from torchtitan.loss.cross_entropy import CrossEntropyLoss
from torchtitan.models.batch import Batch
from torchtitan.parallel.pipeline.runner import PipelineRunner
from torchtitan.training import builder, model_builder
from torchtitan.training.description import describe_run

LAYER_BY_LAYER = parallelism(
    pipeline_parallel_layers_per_stage=1,
    pipeline_parallel_first_stage_less_layers=0,
    pipeline_parallel_last_stage_less_layers=0,
)
CASES = {
    "LoopedBFS, fsdp": Case(4, pp=2, layers=4, schedule="LoopedBFS"),
    "ZBVZeroBubble on 4": Case(4, pp=4, layers=8, schedule="ZBVZeroBubble"),
    "DualPipeV on 4": Case(4, pp=4, layers=8, schedule="DualPipeV"),
    "Interleaved1F1B on 4": Case(4, pp=4, layers=8, schedule="Interleaved1F1B"),
    # torch frees the weights of a fourth stage while it works on the others.
    "4 stages a rank": Case(
        4, pp=2, layers=8, schedule="InterleavedZeroBubble", settings=LAYER_BY_LAYER
    ),
    "larger microbatches": Case(
        2, pp=2, layers=4, settings=parallelism(pipeline_parallel_microbatch_size=4)
    ),
    "accumulating": Case(4, pp=2, layers=4, microbatches=2, schedule="ZBVZeroBubble"),
    "always resharded": Case(
        4,
        pp=2,
        layers=4,
        schedule="Interleaved1F1B",
        settings=parallelism(fsdp_reshard_after_forward="always"),
    ),
    "full checkpointing": Case(4, pp=2, layers=4, schedule="DualPipeV", settings=FULL),
    "packed documents": Case(
        4, pp=2, layers=4, document_mask=True, schedule="ZBVZeroBubble", loss_chunks=1
    ),
}
"""Combinations whose parts, but not the whole, are in the parity table."""


@pytest.mark.parametrize("name", CASES)
def test_pipeline_equals_one_process(name: str, gloo_pool: GlooPool, one_process) -> None:
    case = CASES[name]
    results = gloo_pool.run(case.world_size, tiny.train, case)
    assert tiny.compare(results, one_process(reference_of(case))).worst < TOLERANCE


def test_schedule_from_a_file(tmp_path: Path, gloo_pool: GlooPool, one_process) -> None:
    """Three stages, of which the second rank holds the first two; backwards whole and in halves."""
    first = [f"{kind}{n}" for n in range(8) for kind in ("0F", "1F")]
    back = [f"{kind}{n}" for n in range(8) for kind in ("1I", "0B", "1W")]
    last = [f"{kind}{n}" for n in range(8) for kind in ("2F", "2B")]
    path = tmp_path / "schedule.csv"
    path.write_text(f"{','.join(last)}\n{','.join(first + back)}\n")
    case = Case(2, pp=2, layers=4, settings=parallelism(pipeline_parallel_schedule_csv=str(path)))
    results = gloo_pool.run(2, tiny.train, case)
    assert set(results[0].parameters) > {"output.weight"}
    assert "tok_embeddings.weight" in results[1].parameters
    assert tiny.compare(results, one_process(Case(layers=4))).worst < TOLERANCE


def build(
    world: DistributedContext, case: Case
) -> tuple[model_builder.BuiltModel, PipelineRunner, list[Batch]]:
    config = case.config()
    dims = ParallelDims.from_section(config.parallelism, world.world_size)
    mesh = dims.build_mesh("cpu")
    model = model_builder.build_model(config, tiny.VOCAB_SIZE, mesh, dims, world.device)
    runner = builder.build_runner(config, model, mesh, dims, world.device)
    return model, runner, tiny.microbatches_of(case, dims, world.rank)  # type: ignore[return-value]


def _evaluations(
    world: DistributedContext, case: Case
) -> tuple[list[float], list[dict[str, Tensor]]]:
    """Sums of losses over the data cut in several ways; gradients of a step before and after."""
    model, runner, (batch,) = build(world, case)
    num_targets = int(CrossEntropyLoss().count(tiny.sequences()))
    rows = {name: tensor.split([1, len(tensor) - 1]) for name, tensor in batch.items()}
    uneven = [Batch({name: parts[n] for name, parts in rows.items()}) for n in (0, 1)]
    sums, gradients = [], []
    for batches in ([batch], uneven, [batch, batch]):
        sums.append(runner.evaluate(batches).item())
        assert not [p for p in model.parameters if not isinstance(p, DTensor)], "still gathered"
        assert not [p for p in model.parameters if p.grad is not None]
        assert not any(part.training for part in model.parts)
        runner.forward_backward([batch], num_targets)
        assert all(part.training for part in model.parts)
        gradients.append({n: g for part in model.parts for n, g in _gradients(part).items()})
    return sums, gradients


def _gradients(part: torch.nn.Module) -> dict[str, Tensor]:
    found = {}
    for name, parameter in part.named_parameters():
        assert parameter.grad is not None, name
        found[name] = parameter.grad.full_tensor()  # type: ignore[attr-defined]
    part.zero_grad()
    return found


@pytest.mark.parametrize("schedule", ["1F1B", "Interleaved1F1B", "ZBVZeroBubble"])
def test_evaluation_between_steps(schedule: str, gloo_pool: GlooPool) -> None:
    """Any number of microbatches of any size; the step after it is the step before it."""
    case = Case(4, pp=2, layers=4, schedule=schedule)
    ((alone, _),) = gloo_pool.run(1, _evaluations, Case(layers=4))
    for sums, (first, *later) in gloo_pool.run(4, _evaluations, case):
        assert sums == pytest.approx([alone[0], alone[0], 2 * alone[0]], rel=1e-13)
        for gradients in later:
            assert all(torch.equal(gradients[name], first[name]) for name in first)


def _sequences_at_once(world: DistributedContext, case: Case) -> set[int]:
    model, runner, batches = build(world, case)
    seen = set()
    for part in model.parts:
        part.register_forward_pre_hook(lambda _, arguments: seen.add(len(arguments[0])))
    runner.forward_backward(batches, num_targets=1)
    runner.evaluate(batches)
    runner.dry_run(batches[0])
    return seen


@pytest.mark.parametrize("size", [1, 4])
def test_size_of_microbatches(size: int, gloo_pool: GlooPool) -> None:
    settings = parallelism(pipeline_parallel_microbatch_size=size)
    case = Case(2, pp=2, microbatches=2, settings=settings, schedule="GPipe")
    assert gloo_pool.run(2, _sequences_at_once, case) == [{size}, {size}]


def _held(world: DistributedContext, case: Case) -> tuple[list[str], tuple[str, ...]]:
    model, _, _ = build(world, case)
    return list(model_tensors(model.parts)), model.parameter_names


def test_each_tensor_is_on_one_stage(gloo_pool: GlooPool) -> None:
    results = gloo_pool.run(2, _held, Case(2, pp=2, layers=4, schedule="ZBVZeroBubble"))
    assert sorted(name for names, _ in results for name in names) == sorted(results[0][1])
    assert {"tok_embeddings.weight", "output.weight"} < set(results[0][0])


def _described(world: DistributedContext, case: Case) -> str:
    model, _, _ = build(world, case)
    context = RunContext(case.config(), world.world_size, "cpu")
    return describe_run(
        context,
        ParallelDims.from_section(context.config.parallelism, context.world_size),
        world,
        model,
        "stdlib: 2 files",
    )


def test_log_tells_the_cut(gloo_pool: GlooPool) -> None:
    told = gloo_pool.run(2, _described, Case(2, pp=2, layers=5, schedule="LoopedBFS"))[0]
    assert " a step, 8 microbatches of 1 a rank; data stdlib: 2 files, 8 lanes; " in told
    assert " on 2 ranks of cpu (pp 2), " in told
    assert " a rank before activations and optimizer state; " in told
    assert told.endswith("; stages of 1, 1, 2, 1 layers")
    assert "stages" not in gloo_pool.run(1, _described, Case())[0]


def _dry_run(world: DistributedContext, case: Case) -> list[bool]:
    model, runner, (batch,) = build(world, case)
    runner.dry_run(batch)
    return [p.grad is not None and p.grad.shape == p.shape for p in model.parameters]


def test_dry_run_gives_every_parameter_a_gradient(gloo_pool: GlooPool) -> None:
    for shapes in gloo_pool.run(4, _dry_run, Case(4, pp=2, layers=4, schedule="DualPipeV")):
        assert shapes
        assert all(shapes)


def _train_with_losses_of_other_microbatches(world: DistributedContext, case: Case) -> tiny.Result:
    def next_one(original, self, hidden, index):  # type: ignore[no-untyped-def]
        return original(self, hidden, (index + 1) % len(self._pieces))

    with Patches() as patches:
        patches.put(PipelineRunner, "_loss_of_step", next_one)
        return tiny.train(world, case)


def test_losses_of_other_microbatches_show(gloo_pool: GlooPool, one_process) -> None:
    results = gloo_pool.run(2, _train_with_losses_of_other_microbatches, Case(2, pp=2, layers=4))
    assert tiny.compare(results, one_process(Case(layers=4))).worst > 1e-4
