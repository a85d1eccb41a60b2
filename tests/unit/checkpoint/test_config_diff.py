"""Which keys make another run: all, but those listed with a reason."""

from fnmatch import fnmatchcase
from typing import Any

import pytest

from torchtitan.checkpoint.config_diff import MAY_DIFFER, MUST_NOT, NOTICED, compare, flatten
from torchtitan.config import JobConfig

SAME_RUN: list[tuple[str, Any]] = [
    ("training.on_non_finite", "skip"),
    ("training.on_loss_spike", "ignore"),
    ("training.loss_spike_threshold", 20.0),
    ("job.dump_folder", "elsewhere"),
    ("job.device", "cpu"),
    ("job.custom_import", ["my_code"]),
    ("training.local_batch_size", 2),
    ("training.dataloader.num_workers", 3),
    ("training.loss_chunks", 2),
    ("training.enable_cpu_offload", True),
    ("optimizer.implementation", "foreach"),
    ("optimizer.early_step_in_backward", True),
    ("parallelism.data_parallel_replicate_degree", 2),
    ("parallelism.fsdp_reshard_after_forward", "never"),
    ("activation_checkpoint.mode", "none"),
    ("model.handlers", ["compile"]),
    ("handlers.compile.backend", "eager"),
    ("checkpoint.interval", 7),
    ("checkpoint.load_step", 7),
    ("checkpoint.async_mode", "async"),
    ("checkpoint.initial_load_path", "elsewhere"),
    ("validation.enable", True),
    ("validation.sets", [{"name": "a"}]),
    ("metrics.log_freq", 3),
    ("training.gc_debug", True),
    ("comm.train_timeout_seconds", 5),
    ("comm.trace_buf_size", 0),
    ("debug.deterministic", True),
    ("debug.threads", 2),
]
OTHER_RUN: list[tuple[str, Any]] = [
    ("model.name", "other"),
    ("model.flavor", "8B"),
    ("model.args.n_layers", 2),
    ("model.handlers", ["float8"]),
    ("handlers.float8.recipe", "rowwise"),
    ("training.dataset", "text"),
    ("training.seq_len", 64),
    ("training.global_batch_size", 64),
    ("training.dtype", "bfloat16"),
    ("training.mixed_precision_param", "float32"),
    ("training.document_mask", True),
    ("training.max_norm", 2.0),
    ("data.lanes", 2),
    ("data.text_column", "body"),
    ("data.shuffle", False),
    ("data.epochs", 2),
    ("optimizer.lr", 1.0),
    ("optimizer.param_groups", []),
    ("lr_scheduler.warmup_steps", 3),
    ("lr_scheduler.decay_ratio", 0.5),
    ("debug.seed", 3),
    ("checkpoint.folder", "other"),
]


def changed(key: str, value: Any) -> JobConfig:
    tables: dict[str, Any] = {}
    *path, last = key.split(".")
    table = tables
    for name in path:
        table = table.setdefault(name, {})
    table[last] = value
    return JobConfig.model_validate(tables)


@pytest.mark.parametrize("key, value", SAME_RUN, ids=lambda item: str(item))
def test_same_run(key: str, value: Any) -> None:
    stored = JobConfig().model_dump(exclude_none=True)
    assert compare(stored, changed(key, value))[0] == []
    assert compare(changed(key, value).model_dump(exclude_none=True), JobConfig())[0] == []


@pytest.mark.fault("F31")
@pytest.mark.parametrize("key, value", OTHER_RUN, ids=lambda item: str(item))
def test_other_run(key: str, value: Any) -> None:
    (problem,) = compare(JobConfig().model_dump(exclude_none=True), changed(key, value))[0]
    assert problem.key == key
    assert problem.value == value


def test_keys_of_the_list_exist() -> None:
    keys = [*flatten(JobConfig().model_dump()), *(key for key, _ in SAME_RUN)]
    unset = {
        "job.config_file",
        "training.dataset_path",
        "data.sources.path",
        "checkpoint.initial_load_path",
        "loss.args.reference_path",
        "data.add_bos",
        "data.add_eos",
        "data.chat_template",
        "loss.args.teacher_path",
        "loss.args.reference_cache",
        "training.max_seconds",
        "debug.record_tensors",
    }
    for pattern in (*MAY_DIFFER, *MUST_NOT, *NOTICED):
        assert pattern in unset or any(fnmatchcase(key, pattern) for key in keys), pattern
    assert all(MAY_DIFFER.values())


def test_changes_worth_a_notice() -> None:
    problems, notices = compare({}, changed("training.dataset_path", "/elsewhere"))
    assert problems == []
    assert notices == ["training.dataset_path was unset and is '/elsewhere' from here on."]
    # A run that met a bad row may go on without it.
    assert "data.on_bad_row" in compare({}, changed("data.on_bad_row", "skip"))[1][0]


def test_sources_may_move_but_not_change() -> None:
    def sources(*tables: dict[str, Any]) -> JobConfig:
        return changed("data.sources", list(tables))

    stored = sources({"path": "/a", "weight": 1}, {"path": "/b", "weight": 2})
    before = stored.model_dump(exclude_none=True)
    assert compare(before, stored) == ([], [])
    moved = sources({"path": "/new/a", "weight": 1}, {"path": "/b", "weight": 2})
    problems, notices = compare(before, moved)
    assert problems == [] and "'/new/a'" in notices[0]
    for other in (
        sources({"path": "/a", "weight": 1}, {"path": "/b", "weight": 3}),
        sources({"path": "/a", "weight": 1}),
        sources({"path": "/a", "weight": 1}, {"path": "/b", "weight": 2, "column": "body"}),
    ):
        (problem,) = compare(before, other)[0]
        assert problem.key == "data.sources"


def test_older_configs_compare_by_defaults() -> None:
    """A stored config lacks the keys that were added since, and has keys that were dropped."""
    assert compare({}, JobConfig()) == ([], [])
    stored = JobConfig().model_dump(exclude_none=True)
    del stored["training"]["document_mask"], stored["debug"]
    assert compare(stored, JobConfig()) == ([], [])


@pytest.mark.parametrize(
    ("before", "now", "problems", "notice"),
    [
        ((10, None), (20, None), [], "from 10 to 20; so does the schedule"),
        ((10, None), (20, 20), [], "The schedule of the learning rate grows from 10 to 20 steps."),
        ((10, 20), (20, 20), [], "training.steps grows from 10 to 20."),
        ((10, 20), (20, None), [], "training.steps grows from 10 to 20."),
        ((20, 20), (30, 30), [], "The schedule of the learning rate grows from 20 to 30 steps."),
        ((10, None), (10, 10), [], ""),
        ((10, 20), (10, None), ["lr_scheduler.total_steps"], ""),
        ((10, 20), (10, 15), ["lr_scheduler.total_steps"], ""),
    ],
)
def test_the_schedule_may_grow_and_not_shrink(
    before: tuple[int, int | None], now: tuple[int, int | None], problems: list[str], notice: str
) -> None:
    """Unset, it is as long as the run."""

    def config(steps: int, total: int | None) -> JobConfig:
        tables = {"training": {"steps": steps}, "lr_scheduler": {"total_steps": total}}
        return JobConfig.model_validate(tables)

    found, notices = compare(config(*before).model_dump(exclude_none=True), config(*now))
    assert [issue.key for issue in found] == problems
    assert notice in " ".join(notices)
