"""The comparison of two recorded steps names the first tensor that differs, and nothing else."""

from contextlib import closing
from pathlib import Path

import pytest

from tests.distributed import tiny
from tests.distributed.tiny import Case
from tests.parity.adapted import kind_of
from tests.parity.bugs import Patches
from tests.parity.historical_bugs import BUGS
from tests.parity.table import (
    ALLGATHER,
    COMPILED,
    FULL,
    PACKED,
    PAIRS,
    RING,
    TABLE,
    TIED,
    TOLERANCE,
    ULYSSES,
    dims_of,
    name_of,
    reference_of,
    row,
)
from tests.pool import GlooPool
from torchtitan.distributed.context import DistributedContext
from torchtitan.training.recorded_tensors import RecordedTensors
from torchtitan.training.step_compare import Comparison, compare_steps
from torchtitan.training.tensor_recorder import PHASES


def record(world: DistributedContext, case: Case, folder: Path, bug: str = "") -> int:
    """Record a step of a case, with a mistake; return how often that was made."""
    with Patches() as patches:
        if bug:
            BUGS[bug].put_back(patches)
        tiny.train(world, case, folder)
        return patches.calls


@pytest.fixture(scope="session")
def recorded(gloo_pool: GlooPool, tmp_path_factory: pytest.TempPathFactory):
    """Return the folder of a recorded case; each case is recorded once."""
    folders: dict[str, Path] = {}

    def folder_of(case: Case) -> Path:
        name = name_of(case)
        if name not in folders:
            folder = tmp_path_factory.mktemp("recorded")
            gloo_pool.run(case.world_size, record, case, folder, keep=dims_of(case))
            folders[name] = folder
        return folders[name]

    return folder_of


def compared(one: Path, other: Path) -> Comparison:
    with closing(RecordedTensors(one)) as a, closing(RecordedTensors(other)) as b:
        return compare_steps(a, b)


MESHES = [
    row(shard=2),
    row(replicate=2, shard=2, microbatches=2, **TIED),
    row(tp=2),
    row(tp=8, kv_heads=2),
    row(RING, cp=2, **PACKED),
    row(ULYSSES, cp=2, tp=2),
    row(FULL, pp=2, schedule="1F1B", microbatches=2, **PACKED),
    row(pp=2, schedule="ZBVZeroBubble", layers=4),
    row(PAIRS, ALLGATHER, cp=2, pp=2, schedule="1F1B", **PACKED),
    row(pp=2, schedule="GPipe", **TIED),
    row(COMPILED, shard=2, tp=2),
]
MESHES += [case for case in TABLE if kind_of(case) and case.tp == 2 and case.world_size == 2]


@pytest.mark.parametrize("case", MESHES, ids=name_of)
def test_meshes_do_not_differ(case: Case, recorded) -> None:
    result = compared(recorded(reference_of(case)), recorded(case))
    assert result.differences == []
    assert result.largest < TOLERANCE
    assert result.counts.keys() == set(PHASES) and all(result.counts.values()), result.counts
    in_blocks = [name for name in result.skipped if "layers." in name]
    assert result.skipped == (in_blocks if "compile" in case.config().model.handlers else [])


LOSS, NORM = ("loss", "loss"), ("gradient norm", "gradient norm")
HEAD, LAST_NORM = ("gradients", "output.weight"), ("gradients", "norm.weight")
ATTENTION = ("forward", "layers.0.attention.attend")
FOUND = {
    "pipeline_averages_over_microbatches": (HEAD, "pp", 1 / 8),
    "pipeline_divides_after_the_backward": (("backward", "output"), "pp", 102),
    "norm_of_the_own_stage": (NORM, "pp"),
    "ends_of_a_tied_pipeline_stay_apart": (("gradients", "tok_embeddings.weight"), "pp"),
    "tied_weight_is_counted_at_both_ends": (NORM, "pp"),
    "pipeline_forgets_accumulated_gradients": (HEAD, "pp"),
    "pipeline_reuses_the_first_documents": (("batch", "document_ids"), "pp"),
    "depth_is_counted_in_each_stage": (
        ("parameters", "layers.1.attention.wo.weight"),
        "pp",
        2**0.5,
    ),
    "loss_is_averaged_per_rank": (LOSS, "dp_shard"),
    "gradients_are_averaged_over_ranks": (HEAD, "dp_shard", 1 / 2),
    "loss_is_averaged_per_microbatch": (LOSS, None),
    "accumulation_divides_twice": (LOSS, "dp_shard"),
    "only_the_first_microbatch_is_reduced": (LAST_NORM, "dp_shard"),
    "norm_of_the_own_shard": (NORM, "dp_shard"),
    "norm_counts_copies": (NORM, "dp_replicate"),
    "norm_counts_what_tensor_parallel_ranks_share": (NORM, "tp"),
    "seeds_differ_between_ranks": (("parameters", "tok_embeddings.weight"), "dp_shard"),
    "vocabulary_is_cut_evenly": (LOSS, "tp"),
    "padding_of_the_vocabulary_takes_part": (LOSS, "tp"),
    "z_loss_is_of_the_own_rows": (LOSS, "tp"),
    "loss_is_counted_on_every_tensor_parallel_rank": (LOSS, "tp"),
    "norm_weights_gradients_stay_apart": (LAST_NORM, "tp"),
    "norm_weights_gradients_are_averaged": (LAST_NORM, "tp", 1 / 2),
    "copies_of_key_heads_are_not_added_up": (("gradients", "layers.1.attention.wv.weight"), "tp"),
    "positions_are_not_permuted": (("batch", "positions"), "cp"),
    "mask_is_for_a_sequence_in_order": (ATTENTION, "cp"),
    "documents_are_ignored": (ATTENTION, "cp"),
    "documents_are_counted_in_each_share": (ATTENTION, "cp"),
    "queries_that_see_nothing_count": (ATTENTION, "cp"),
    "backward_normalises_by_one_share": (("backward", "layers.1.attention.attend"), "cp"),
    "labels_are_shifted_in_each_share": (("batch", "labels"), "cp"),
    "gradients_stay_apart_along_the_sequence": (LAST_NORM, "cp"),
}
"""The first tensor that each mistake changes, the axis of the mesh, and the factor, if it is one.

A loss has no module: what it is made of, batch and hidden states, has been found to be alike.
"""


@pytest.mark.parametrize("bug", BUGS)
def test_mistake_is_found(bug: str, recorded, gloo_pool: GlooPool, tmp_path: Path) -> None:
    case = BUGS[bug].case
    assert any(gloo_pool.run(case.world_size, record, case, tmp_path, bug, keep=dims_of(case)))
    result = compared(recorded(reference_of(case)), tmp_path)
    first = result.differences[0]
    place, axis, *factor = FOUND[bug]
    assert (first.phase, first.name.partition(" #")[0]) == place
    assert first.axes == (() if axis is None else (axis,))
    assert [first.ratio] == pytest.approx(factor or [None])
    assert first.relative > 1e5 * result.bound > 1e9 * result.largest / 1e5


def test_the_side_with_more_ranks_may_come_first(
    recorded, gloo_pool: GlooPool, tmp_path: Path
) -> None:
    case = BUGS["seeds_differ_between_ranks"].case
    gloo_pool.run(case.world_size, record, case, tmp_path, "seeds_differ_between_ranks")
    first = compared(tmp_path, recorded(reference_of(case))).differences[0]
    assert (first.name, first.axes, first.ranks) == ("tok_embeddings.weight", ("dp_shard",), (1,))


def test_two_meshes_with_parts_of_different_sizes(
    recorded, gloo_pool: GlooPool, tmp_path: Path
) -> None:
    few, many = row(tp=2), row(tp=4)
    result = compared(recorded(few), recorded(many))
    assert (result.differences, result.skipped) == ([], [])
    gloo_pool.run(2, record, few, tmp_path, "norm_weights_gradients_stay_apart")
    first = compared(tmp_path, recorded(many)).differences[0]
    assert (first.phase, first.name, first.axes) == (*LAST_NORM, ("tp",))
