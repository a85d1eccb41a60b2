"""What pipeline parallelism refuses, and what it does not."""

from pathlib import Path
from types import SimpleNamespace
from typing import Any

import pytest
from torch.distributed.pipelining import schedules

from torchtitan.config import JobConfig
from torchtitan.config.run_context import RunContext
from torchtitan.parallel.pipeline.schedules import SCHEDULES
from torchtitan.preflight import FILES, errors_of, preflight
from torchtitan.preflight import pipeline_parallel as pipeline_checks

NAMED = ["tok_embeddings", "layers.0", "layers.1", "layers.2", "layers.3", "norm", "output"]


def context(
    degree: int, sections: dict[str, dict[str, Any]] | None = None, **keys: Any
) -> RunContext:
    """A pipeline alone, of a model with 4 layers. A step has 8 microbatches."""
    names = ("module_fqns_per_model_part", "fsdp_reshard_after_forward")
    parallelism = {k if k in names else f"pipeline_parallel_{k}": v for k, v in keys.items()}
    config: dict[str, dict[str, Any]] = {
        "model": {"args": {"n_layers": 4}},
        "parallelism": {"pipeline_parallel_degree": degree, **parallelism},
        "training": {"dataset": "stdlib", "local_batch_size": 8},
        "activation_checkpoint": {"mode": "none"},
    }
    for name, values in (sections or {}).items():
        config[name] = {**config.get(name, {}), **values}
    return RunContext(JobConfig.model_validate(config), degree, "cpu")


def errors(degree: int, sections: dict[str, dict[str, Any]] | None = None, **keys: Any) -> str:
    found = context(degree, sections, **keys)
    return "\n".join(map(str, errors_of(pipeline_checks.check_static(found))))


@pytest.mark.parametrize(
    ("degree", "keys"),
    [
        (2, {}),
        (4, {}),
        (4, {"microbatch_size": 2}),
        (2, {"schedule": "Interleaved1F1B", "microbatch_size": 4}),
        (2, {"schedule": "DualPipeV", "microbatch_size": 2}),
        (2, {"schedule": "1F1B", "layers_per_stage": 3}),
        (2, {"module_fqns_per_model_part": [NAMED[:3], NAMED[3:]]}),
        (2, {"split_points": ["layers.1"]}),
        (2, {"split_points": ["layers.0", "layers.3", "norm"], "schedule": "Interleaved1F1B"}),
        (2, {"first_stage_less_layers": 2}),
        (1, {"schedule_csv": "none.csv", "microbatch_size": 3}),
    ],
)
def test_accepted(degree: int, keys: dict[str, Any]) -> None:
    assert errors(degree, **keys) == ""


INTERLEAVED = {"schedule": "Interleaved1F1B"}


@pytest.mark.parametrize(
    ("degree", "keys", "expected"),
    [
        (5, {}, "degree = 5: 1F1B makes 5 stages, and the model has 4 layers. Fix: set it to "
         "at most 4."),
        (2**40, {}, "set it to at most 4"),  # and nothing of that length is made
        (4, INTERLEAVED, "makes 8 stages, and the model has 4 layers. Fix: set it to at most 2"),
        (2, {"microbatch_size": 3}, "microbatch_size = 3: does not divide training.local_batch_size"
         " = 8. Fix: set it to 1 or to another divisor"),
        (2, {"microbatch_size": 8}, "global_batch_size = 8: a step has 1 microbatch on each rank, "
         "and 1F1B on 2 pipeline ranks needs at least 2. Fix: raise it, or lower "
         "parallelism.pipeline_parallel_microbatch_size"),
        (2, {"schedule": "DualPipeV", "microbatch_size": 4}, "needs at least 4. Fix: raise it"),
        (2, {"layers_per_stage": 2}, "layers_per_stage: makes 3 stages, and 1F1B on 2 pipeline "
         "ranks needs 2. Fix: leave it unset"),
        (2, {**INTERLEAVED, "layers_per_stage": 3}, "needs 4, 6 or so on. Fix: leave"),
        (2, {**INTERLEAVED, "layers_per_stage": 1}, "makes 6 stages, and the model has 4 layers"),
        (2, {"first_stage_less_layers": 4}, "first_stage_less_layers = 4: leaves no layer for that "
         "stage, which needs at least one. Fix: set it to at most 3"),
        (2, {"last_stage_less_layers": 9}, "last_stage_less_layers = 9: leaves no layer"),
        (2, {"module_fqns_per_model_part": [NAMED]}, "makes 1 stages, and 1F1B on 2 pipeline ranks "
         "needs 2. Fix: leave it unset"),
        (2, {"module_fqns_per_model_part": [NAMED[:3], ["layer.2", *NAMED[4:]]]},
         'the model has no module "layer.2". Fix: did you mean "layers.2"?'),
        (2, {"module_fqns_per_model_part": [NAMED[:3], ["zzz", *NAMED[3:]]]},
         "choose from tok_embeddings, layers.0, layers.1"),
        (2, {"module_fqns_per_model_part": [NAMED[:3], NAMED[4:]]}, "leaves out layers.2"),
        (2, {"module_fqns_per_model_part": [NAMED[:3], NAMED[2:]]}, 'each once'),
        (2, {"module_fqns_per_model_part": [[], NAMED]}, "stage 0 has no parameters"),
        (2, {"module_fqns_per_model_part": [NAMED[3:], NAMED[:3]]}, "in the order of the forward"),
        (2, {"module_fqns_per_model_part": [NAMED[:3], NAMED[3:]], "split_points": ["layers.2"]},
         "split_points: parallelism.module_fqns_per_model_part says the same in another way"),
        (2, {"split_points": ["layers.1", "layers.2"]}, "split_points: makes 3 stages, and 1F1B on "
         "2 pipeline ranks needs 2. Fix: leave it unset"),
        (2, {"split_points": ["layer.1"]}, 'begin at "layer.1". Fix: did you mean "layers.1"?'),
        (2, {"split_points": ["tok_embeddings"]}, 'no stage can begin at "tok_embeddings"'),
        (2, {**INTERLEAVED, "split_points": ["layers.2", "layers.1", "layers.3"]},
         "not in the order of the forward"),
        (2, {**INTERLEAVED, "split_points": ["layers.1", "layers.1", "layers.3"]}, "each once"),
    ],
)  # fmt: skip
def test_refused(degree: int, keys: dict[str, Any], expected: str) -> None:
    message = errors(degree, **keys)
    assert expected in message
    assert "Fix: " in message


@pytest.mark.parametrize(
    ("sections", "expected"),
    [
        ({"model": {"handlers": ["compile"]}}, "compiled blocks compute both at once"),
        (
            {"activation_checkpoint": {"mode": "selective", "selective_ac_option": "op"}},
            'set activation_checkpoint.selective_ac_option to "2"',
        ),
        ({"parallelism": {"fsdp_reshard_after_forward": "always"}}, "needs the gathered weights"),
    ],
)
@pytest.mark.parametrize("schedule", SCHEDULES)
def test_what_a_split_backward_excludes(
    schedule: str, sections: dict[str, dict[str, Any]], expected: str
) -> None:
    message = errors(2, sections, schedule=schedule)
    assert (expected in message) == SCHEDULES[schedule].splits_backward
    assert bool(message) == SCHEDULES[schedule].splits_backward


@pytest.mark.parametrize(("installed", "splits"), [("2.11.0+cu130", False), ("2.13.0", True)])
def test_a_split_backward_needs_a_torch_that_can(
    installed: str, splits: bool, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr(pipeline_checks, "version", lambda _: installed)
    message = errors(2, schedule="ZBVZeroBubble")
    assert ("install torch 2.13 or newer" in message) == (not splits)
    assert "torch" not in errors(2, schedule="1F1B")


def test_a_batch_fills_rounds() -> None:
    sections = {"training": {"local_batch_size": 3}, "model": {"args": {"n_layers": 8}}}
    (problem,) = pipeline_checks.check_static(context(2, sections, **INTERLEAVED))
    assert problem.severity == "warning"
    nine = {"training": {"local_batch_size": 3, "global_batch_size": 9}}
    assert "Fix: give each rank a multiple of 2" in errors(2, {**sections, **nine}, **INTERLEAVED)


def test_a_huge_batch_is_judged_at_once() -> None:
    sections = {"training": {"global_batch_size": 8 * (10**15 + 1)}}
    message = errors(3, sections | {"model": {"args": {"n_layers": 6}}}, **INTERLEAVED)
    assert "its number of rounds. Fix: give each rank a multiple of 3 microbatches" in message


def test_few_microbatches_are_worth_a_warning() -> None:
    for keys in (
        {"schedule": "GPipe", "microbatch_size": 8},
        {**INTERLEAVED, "microbatch_size": 4},
    ):
        (problem,) = pipeline_checks.check_static(context(2, **keys))
        assert problem.severity == "warning"
        assert "ranks will often be idle" in str(problem)


@pytest.mark.parametrize("degree", [2, 3, 4])
@pytest.mark.parametrize("schedule", SCHEDULES)
def test_torch_accepts_what_the_check_accepts(schedule: str, degree: int) -> None:
    """Every number of microbatches up to 13; and a multiple of the stages is accepted."""
    kind = SCHEDULES[schedule]
    num_stages = degree * (kind.stages_per_rank or 2)
    held = [0, num_stages - 1] if kind.is_v else list(range(0, num_stages, degree))
    stages: list[Any] = [
        SimpleNamespace(
            stage_index=n, num_stages=num_stages, group_size=degree, group_rank=0, submod=None
        )
        for n in held
    ]
    made = schedules.get_schedule_class(schedule)
    single = issubclass(made, schedules.PipelineScheduleSingle)
    refused = []
    for count in range(1, 14):
        sections: dict[str, dict[str, Any]] = {
            "model": {"args": {"n_layers": 8}},
            "training": {"local_batch_size": count},
        }
        message = errors(degree, sections, schedule=schedule)
        if message:
            refused.append(count)
            sections["training"]["global_batch_size"] = count * num_stages
            assert errors(degree, sections, schedule=schedule) == ""
        else:
            made(stages[0] if single else stages, count, loss_fn=lambda *_: None)
    assert bool(refused) == (schedule != "GPipe")


def test_schedule_of_a_file(tmp_path: Path) -> None:
    path = tmp_path / "schedule.csv"
    lines = [[f"{stage}{kind}{n}" for kind in "FB" for n in range(8)] for stage in (0, 1)]
    path.write_text("\n".join(map(",".join, lines)))
    keys = {"schedule_csv": str(path), "fsdp_reshard_after_forward": "always"}

    def found(degree: int = 2, **more: Any) -> str:
        problems = preflight(context(degree, **keys, **more), [FILES])
        return "\n".join(str(problem) for problem in problems if "pipeline" in str(problem))

    assert found() == ""
    assert "has 2 lines for parallelism.pipeline_parallel_degree = 4" in found(4)
    assert "a step's 16 microbatches (sequences" in found(
        sections={"training": {"local_batch_size": 16}}
    )
    assert "makes 2 stages, and the model has 1 layers. Fix: write one of at most 1" in found(
        sections={"model": {"args": {"n_layers": 1}}}
    )
    assert "4 microbatches" in found(microbatch_size=2)
    path.write_text(
        "\n".join([",".join(lines[0]), ",".join(["1B0", *lines[1][:8], *lines[1][9:]])])
    )
    assert "without first running Forward" in found()
    path.write_text("\n".join(map(",".join, lines)))
    halves = path.read_text().replace("1B7", "1I7,1W7")
    path.write_text(halves)
    assert "needs the gathered weights until then" in found()
    path.unlink()
    assert "cannot be read: No such file" in found()


def test_named_modules_of_a_files_schedule(tmp_path: Path) -> None:
    path = tmp_path / "schedule.csv"
    lines = [[f"{stage}{kind}{n}" for kind in "FB" for n in range(8)] for stage in (0, 1)]
    path.write_text("\n".join(map(",".join, lines)))
    names = [NAMED[:2], NAMED[2:4], NAMED[4:]]
    problems = preflight(
        context(2, schedule_csv=str(path), module_fqns_per_model_part=names), [FILES]
    )
    assert "makes 3 stages, and the schedule's file has 2" in "\n".join(map(str, problems))
