"""What is wrong with `[validation]` is told before anything starts, by the keys as written."""

import gzip
import json
from pathlib import Path
from typing import Any

import pytest
from data_runs import make_documents, write_jsonl

from tests.chat_data import write_rows
from torchtitan.config import JobConfig
from torchtitan.config.load import load_config
from torchtitan.config.run_context import RunContext
from torchtitan.data.named_sources import validation_sets
from torchtitan.preflight import ARITHMETIC, FILES, errors_of, preflight
from torchtitan.preflight.validation import check_environment, check_static

JSON = {"dataset": "json", "dataset_path": "x.jsonl"}
BATCH = {"local_batch_size": 4, "global_batch_size": 12, "seq_len": 32, "steps": 100}


def facts_of(
    validation: dict[str, Any], world_size: int = 1, mesh: dict[str, Any] | None = None, **data: Any
) -> RunContext:
    config = {
        "training": {"dataset": "stdlib", **BATCH},
        "validation": {"enable": True, **validation},
        "parallelism": mesh or {},
        "data": data,
        "lr_scheduler": {"warmup_steps": 2},
    }
    return RunContext(JobConfig.model_validate(config), world_size, "cpu")


def told(context: RunContext, phases: tuple[str, ...] = (ARITHMETIC,)) -> str:
    (problem,) = preflight(context, phases)
    return str(problem)


def table(name: str, **keys: Any) -> dict[str, Any]:
    return {"name": name, **JSON, **keys}


BAD = [
    (
        {"dataset": "c5_validation"},
        'validation.dataset = "c5_validation": is unknown. Fix: did you',
    ),
    ({"dataset": ""}, 'validation.dataset = "": is unknown'),
    ({"dataset": "json"}, 'validation.dataset_path = unset: dataset "json" needs it'),
    ({"dataset": "stdlib", "dataset_path": "x"}, 'validation.dataset_path = "x": is not used by'),
    ({**JSON, "steps": 0}, "validation.steps = 0: must be at least 1, or -1"),
    ({**JSON, "seq_len": 2**20}, "validation.seq_len = 1048576: longer than model.args.max_seq"),
    (
        {**JSON, "dataloader": {"prefetch_factor": 2}},
        "validation.dataloader.prefetch_factor = 2: nothing is read ahead",
    ),
    ({"sets": [table("a"), table("a")]}, 'validation.sets[0].name = "a": is the name of several'),
    ({"sets": [table("a/b")]}, 'validation.sets[0].name = "a/b": cannot be a part of a metric'),
    ({"sets": [table("")]}, 'validation.sets[0].name = ""'),
    ({"sets": [table("a")], "dataset": "c4"}, 'validation.dataset = "c4": and [[validation.sets]]'),
    ({"sets": [table("a")], "dataset_path": "x"}, 'validation.dataset_path = "x": and [[valid'),
    (
        {"sets": [table("a"), {"name": "b", "dataset": "text"}]},
        'validation.sets[1].dataset_path = unset: dataset "text" needs it',
    ),
    (
        {"sets": [table("a", split="test")]},
        'validation.sets[0].split = "test": is not used by "json"',
    ),
    (
        {"sets": [table("a", subset="en")]},
        'validation.sets[0].subset = "en": is not used by "json". Fix: remove it; it is for'
        " dataset = ",
    ),
]


@pytest.mark.parametrize(("validation", "start"), BAD, ids=lambda item: str(item)[:50])
def test_bad_sets(validation: dict[str, Any], start: str):
    assert told(facts_of(validation)).startswith(start)
    assert preflight(facts_of({**validation, "enable": False}), [ARITHMETIC]) == []


@pytest.mark.parametrize("key", ["freq", "local_batch_size", "seq_len", "lanes"])
def test_numbers_below_one(key: str):
    with pytest.raises(ValueError, match=rf"validation\.{key} = 0: must be"):
        load_config([f"--validation.{key}=0"])


@pytest.mark.parametrize(
    ("mesh", "validation", "start"),
    [
        (
            {"context_parallel_degree": 2},
            {"seq_len": 30},
            "validation.seq_len = 30: is not a multiple of 4, as context_parallel_degree = 2",
        ),
        (
            {"tensor_parallel_degree": 2},
            {"seq_len": 31},
            "validation.seq_len = 31: is not a multiple of 2, as",
        ),
        (
            {"pipeline_parallel_degree": 2, "pipeline_parallel_microbatch_size": 2},
            {"local_batch_size": 3},
            "validation.local_batch_size = 3: is not a multiple of parallelism.pipeline_parallel_m"
            "icrobatch_size = 2. Fix: set it to a multiple",
        ),
    ],
)
def test_what_the_mesh_cannot_take(mesh: dict[str, Any], validation: dict[str, Any], start: str):
    assert told(facts_of({**JSON, **validation}, 2, mesh)).startswith(start)
    # of training, it is told once
    assert preflight(facts_of(JSON, 2, mesh), [ARITHMETIC]) == []


def write(folder: Path, rows: list[Any]) -> dict[str, Any]:
    path = folder / "set.jsonl.gz"
    path.write_bytes(gzip.compress("".join(json.dumps(row) + "\n" for row in rows).encode()))
    return {"dataset": "json", "dataset_path": str(path)}


def test_files_that_are_not_there(tmp_path: Path):
    missing = str(tmp_path / "none.jsonl")
    context = facts_of({"dataset": "json", "dataset_path": missing})
    (problem,) = errors_of(preflight(context, [FILES]))
    assert problem.key == "validation.dataset_path" and problem.missing_asset
    several = facts_of({"sets": [table("a", dataset_path=missing)]})
    assert told(several, (FILES,)).startswith(f'validation.sets[0].dataset_path = "{missing}": ')


def test_rows_without_text(tmp_path: Path):
    sets = [{"name": "a", **write(tmp_path, [{"body": "x"}])}]
    assert told(facts_of({"sets": sets}), (FILES,)).startswith("validation.sets[0].column")
    assert preflight(facts_of({"sets": [{**sets[0], "column": "body"}]}), [FILES]) == []
    one = write(tmp_path, [{"body": "x"}])
    assert told(facts_of(one), (FILES,)).startswith('validation.column = "text": ')
    assert preflight(facts_of({**one, "column": "body"}), [FILES]) == []
    beside = told(facts_of({"column": "body", "sets": sets}))
    assert beside.startswith('validation.column = "body": and [[validation.sets]] both say')
    (problem,) = preflight(facts_of(write(tmp_path, [{"text": ""}])), [FILES])
    assert problem.severity == "warning" and "hold no text" in problem.problem


def test_a_set_may_be_smaller_than_anything(tmp_path: Path):
    """A document is a set: neither the lanes nor the batch of training ask for more."""
    context = facts_of(write(tmp_path, [{"text": "one"}]), lanes=12)
    assert preflight(context, [ARITHMETIC, FILES]) == []


def test_a_warning_for_what_is_trained_on(tmp_path: Path):
    path = write_jsonl(tmp_path, make_documents(50))
    context = RunContext(
        JobConfig.model_validate(
            {
                "training": {"dataset": "json", "dataset_path": path, **BATCH},
                "validation": {"enable": True, "dataset": "json", "dataset_path": path},
            }
        ),
        1,
        "cpu",
    )
    (problem,) = check_environment(context)
    assert problem.key == "validation.dataset_path" and problem.severity == "warning"
    assert "1 of the files are in the training data, too" in problem.problem


def test_sets_take_what_they_do_not_say_from_training():
    context = facts_of({"sets": [table("a", column="body"), {"name": "b", "dataset": "hf:o/n"}]})
    first, second = validation_sets(context.config)
    assert (first.name, second.name) == ("a", "b")
    assert (first.training.seq_len, first.training.local_batch_size) == (32, 4)
    assert (first.data.text_column, second.data.text_column) == ("body", "text")
    assert second.data.split == "validation"
    assert check_static(context) == []
    assert validation_sets(JobConfig()) == []
    (only,) = validation_sets(facts_of({"seq_len": 16, "local_batch_size": 2}).config)
    assert (only.name, only.training.dataset) == ("validation", "c4_validation")
    assert (only.training.seq_len, only.training.local_batch_size) == (16, 2)


def test_the_dataset_goes_by_the_path(tmp_path: Path) -> None:
    (tmp_path / "c4" / "en").mkdir(parents=True)
    (tmp_path / "c4" / "en" / "c4-validation.00000-of-00008.json.gz").touch()
    file = tmp_path / "rows.parquet"
    found = [
        validation_sets(facts_of({"dataset_path": str(path)}).config)[0].training.dataset
        for path in (file, tmp_path, tmp_path / "c4", tmp_path / "c4" / "en")
    ]
    assert found == ["auto", "auto", "c4_validation", "c4_validation"]
    write_rows(tmp_path, [{"text": f"text {n} " * 9} for n in range(9)], file.name)
    context = facts_of({"dataset_path": str(file), "seq_len": 16})
    assert check_static(context) == check_environment(context) == []
