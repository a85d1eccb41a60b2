"""Which layers form which stage."""

import itertools

import pytest

from torchtitan.config import ConfigError, JobConfig
from torchtitan.models.registry import get_family
from torchtitan.parallel.pipeline.stages import PipelinePlan, plan_pipeline


def plan(
    modules: dict[str, int], degree: int, schedule: str = "1F1B", **keys: object
) -> PipelinePlan:
    parallelism = {
        "pipeline_parallel_degree": degree,
        "pipeline_parallel_schedule": schedule,
        **{
            key if "fqns" in key else f"pipeline_parallel_{key}": value
            for key, value in keys.items()
        },
    }
    section = JobConfig.model_validate({"parallelism": parallelism}).parallelism
    return plan_pipeline(section, modules)


def model(layers: int, embedding: int = 0, head: int = 0) -> dict[str, int]:
    """Modules of which a layer has 100 parameters."""
    blocks = {f"layers.{n}": 100 for n in range(layers)}
    return {"tok_embeddings": embedding, **blocks, "norm": 0, "output": head}


@pytest.mark.parametrize(
    ("modules", "degree", "expected"),
    [
        (model(8), 4, [2, 2, 2, 2]),
        (model(9), 4, [2, 2, 2, 3]),  # the last stage holds the fewest microbatches
        (model(8, 200, 200), 4, [1, 3, 3, 1]),
        (model(8, 100, 250), 2, [5, 3]),
        (model(4, 1000, 1000), 4, [1, 1, 1, 1]),
        (model(12, 1000, 0), 4, [1, 3, 4, 4]),
    ],
)
def test_balance(modules: dict[str, int], degree: int, expected: list[int]) -> None:
    assert plan(modules, degree).layers == expected


def test_stages_are_the_model_in_order() -> None:
    modules = model(7, 130, 270)
    for degree in range(2, 8):
        stages = plan(modules, degree).stages
        assert [name for stage in stages for name in stage] == list(modules)


@pytest.mark.parametrize("ends", list(itertools.product([0, 70, 150, 420], repeat=2)))
@pytest.mark.parametrize(("layers", "degree"), [(5, 2), (7, 3), (9, 4)])
def test_no_cut_is_better(layers: int, degree: int, ends: tuple[int, int]) -> None:
    """The heaviest stage is as light as it can be; then the sum of squares is the smallest."""

    def cost(counts: tuple[int, ...]) -> tuple[int, int]:
        weights = [100 * count for count in counts]
        weights[0] += ends[0]
        weights[-1] += ends[1]
        return max(weights), sum(weight**2 for weight in weights)

    ways = itertools.product(range(1, layers + 1), repeat=degree)
    best = min(cost(counts) for counts in ways if sum(counts) == layers)
    assert cost(tuple(plan(model(layers, *ends), degree).layers)) == best


def test_keys_replace_the_weights_of_the_ends() -> None:
    heavy = model(8, 300, 300)
    even = {"first_stage_less_layers": 0, "last_stage_less_layers": 0}
    assert plan(heavy, 2, **even).layers == [4, 4]
    assert plan(heavy, 2, **even | {"first_stage_less_layers": 2}).layers == [3, 5]
    assert plan(heavy, 2, **even | {"last_stage_less_layers": 4}).layers == [6, 2]


def test_layers_per_stage_are_counted_as_in_torchtitan() -> None:
    """ceil((8 + 1 + 1) / 3) = 4 stages; the ends count for one layer each unless set."""
    assert len(plan(model(8), 2, "Interleaved1F1B", layers_per_stage=3).stages) == 4
    both = {"first_stage_less_layers": 0, "last_stage_less_layers": 0}
    assert len(plan(model(8), 2, "Interleaved1F1B", layers_per_stage=2, **both).stages) == 4


@pytest.mark.parametrize(
    ("schedule", "stage_to_rank"),
    [
        ("1F1B", [0, 1, 2]),
        ("GPipe", [0, 1, 2]),
        ("Interleaved1F1B", [0, 1, 2, 0, 1, 2]),
        ("LoopedBFS", [0, 1, 2, 0, 1, 2]),
        ("InterleavedZeroBubble", [0, 1, 2, 0, 1, 2]),
        ("ZBVZeroBubble", [0, 1, 2, 2, 1, 0]),
        ("DualPipeV", [0, 1, 2, 2, 1, 0]),
    ],
)
def test_holders(schedule: str, stage_to_rank: list[int]) -> None:
    made = plan(model(6), 3, schedule)
    assert list(made.stage_to_rank) == stage_to_rank
    assert [stage for rank in range(3) for stage in made.held_by(rank)] == sorted(
        range(len(stage_to_rank)), key=lambda stage: (stage_to_rank[stage], stage)
    )


def test_named_modules_may_be_cut_anywhere() -> None:
    names = [["tok_embeddings"], ["layers.0", "layers.1", "norm"], ["output"]]
    made = plan(model(2, 70, 70), 3, module_fqns_per_model_part=names)
    assert [list(stage) for stage in made.stages] == names
    assert made.layers == [0, 2, 0]


def test_a_model_without_modules_is_refused() -> None:
    with pytest.raises(ConfigError, match=r"cannot be split into stages. Fix: set it to 1"):
        plan({}, 2)


def test_405b_was_made_for_this() -> None:
    """Its 126 layers leave room for the embedding and the head at the ends of a pipeline."""
    flavor = get_family("llama3").flavors["405B"]
    modules = flavor.model_copy(update={"vocab_size": 128256}).modules()
    assert plan(modules, 8).layers == [15, 16, 16, 16, 16, 16, 16, 15]


def test_a_stage_needs_parameters() -> None:
    names = [["layers.0", "layers.1"], ["norm"]]
    modules = {"layers.0": 100, "layers.1": 100, "norm": 0}
    with pytest.raises(ConfigError, match="has no parameters"):
        plan(modules, 2, module_fqns_per_model_part=names)
    with pytest.raises(ConfigError, match="has no parameters"):
        plan(modules, 2, split_points=["norm"])


def test_stages_begin_at_the_split_points() -> None:
    modules = model(4, 100, 100)
    cut = plan(modules, 2, "Interleaved1F1B", split_points=["layers.1", "layers.3", "norm"])
    assert [list(stage) for stage in cut.stages] == [
        ["tok_embeddings", "layers.0"],
        ["layers.1", "layers.2"],
        ["layers.3"],
        ["norm", "output"],
    ]
    assert cut.stage_to_rank == (0, 1, 0, 1)
