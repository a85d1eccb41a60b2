"""`[evaluation]`: the same answers on every mesh, and a training that it does not change."""

import json
import signal
import time
from contextlib import closing, contextmanager
from dataclasses import replace
from pathlib import Path
from typing import Any

import pytest
import torch

from tests.distributed import runs
from tests.distributed.tiny import Case
from tests.eval_tasks import NAMES, record, write_tasks
from tests.pool import GlooPool
from torchtitan.config import ConfigError
from torchtitan.config.run_context import RunContext
from torchtitan.data.tokenizers import build_tokenizer
from torchtitan.distributed.context import DistributedContext
from torchtitan.distributed.parallel_dims import ParallelDims
from torchtitan.training import builder, model_builder
from torchtitan.training.evaluation import build_evaluator
from torchtitan.utils.processes import StopRequest

pytest.importorskip("lm_eval", reason="needs the extra eval")

COMPILED = {
    "model": {"handlers": ["compile"]},
    "handlers": {"compile": {"backend": "aot_eager"}},
}
SCORED = NAMES[:2]
"""Cases that pipelines and context parallelism can run."""
CASES = {
    "fsdp 3": (Case(3), NAMES),
    "ddp 2": (Case(2, replicate=2, shard=1), NAMES),
    "tp 2, fsdp 2": (Case(4, tp=2), NAMES),
    "masked": (Case(document_mask=True), NAMES),
    "compiled, fsdp 2": (Case(2, settings=COMPILED), NAMES),
    "cp 2, tp 2": (Case(4, cp=2, tp=2), SCORED),
    "ulysses 2, masked": (
        Case(
            2,
            cp=2,
            document_mask=True,
            settings={"parallelism": {"context_parallel_method": "ulysses"}},
        ),
        SCORED,
    ),
    "fsdp 2, pp 2": (Case(4, pp=2), SCORED),
}


class Records:
    """In place of the metrics."""

    def __init__(self) -> None:
        self.found: dict[str, Any] = {}

    @contextmanager
    def timing(self, name: str):
        assert name == "evaluation"
        yield

    def log_evaluation(self, step: int, task: str, values: dict[str, float]) -> None:
        assert step == 7
        self.found[task] = values


def evaluate(
    world: DistributedContext, case: Case, tasks: str, names: list[str], stopping_rank: int = -1
) -> tuple[dict[str, Any], list[Any]]:
    """Log records of the initial model, and all answers; collective."""
    torch._dynamo.reset()
    section = {"tasks": names, "task_dir": tasks, "num_fewshot": 0, "batch_size": 2}
    settings = {**case.settings, "evaluation": section}
    config = replace(case, settings=settings).config()
    context = RunContext(config, world.world_size, "cpu")
    dims = ParallelDims.from_section(config.parallelism, world.world_size)
    mesh = dims.build_mesh("cpu")
    tokenizer = build_tokenizer("bytes")
    model = model_builder.build_model(config, tokenizer.vocab_size, mesh, dims, world.device)
    runner = builder.build_runner(config, model, mesh, dims, world.device)
    stop = StopRequest()
    stop.requested = world.rank == stopping_rank
    evaluator = build_evaluator(context, dims, world, tokenizer, model, mesh, runner, stop)
    answers = record(evaluator._harness)
    records: Any = Records()
    evaluator.run(7, records)
    return records.found, [answer for _, answer in answers]


@pytest.fixture(scope="module")
def tasks(tmp_path_factory: pytest.TempPathFactory) -> str:
    return str(write_tasks(tmp_path_factory.mktemp("eval"), num_capitals=3))


@pytest.fixture(scope="module")
def expected(gloo_pool: GlooPool, tasks: str) -> tuple[dict[str, Any], list[Any]]:
    (found,) = gloo_pool.run(1, evaluate, Case(), tasks, NAMES)
    assert found[0].keys() == set(NAMES)
    assert len(found[1]) == 15 + 2 + 3
    return found


@pytest.mark.parametrize("name", CASES)
def test_the_same_answers_on_every_mesh(
    name: str, gloo_pool: GlooPool, tasks: str, expected: tuple[dict[str, Any], list[Any]]
) -> None:
    case, names = CASES[name]
    for records, answers in gloo_pool.run(case.world_size, evaluate, case, tasks, names):
        assert records.keys() == set(names)
        for task, values in records.items():
            assert values == pytest.approx(expected[0][task], rel=1e-9)
        for answer, other in zip(answers, expected[1], strict=len(names) == len(NAMES)):
            assert answer == (other if isinstance(other, str) else pytest.approx(other, rel=1e-9))


def test_a_rank_that_is_asked_to_stop_ends_it_for_all(gloo_pool: GlooPool, tasks: str) -> None:
    assert gloo_pool.run(3, evaluate, Case(3), tasks, NAMES, 1) == [({}, [])] * 3


def test_a_task_that_fails_ends_no_training(gloo_pool: GlooPool, tmp_path: Path) -> None:
    """Alike on all ranks: no figure, and the run goes on."""
    tasks = str(write_tasks(tmp_path))
    rows = [{"country": "Peru", "choices": ["a", b], "label": 0} for b in ("b", None)]
    (tmp_path / "capitals.jsonl").write_text("".join(json.dumps(row) + "\n" for row in rows))
    for records, answers in gloo_pool.run(2, evaluate, Case(2), tasks, ["capitals"]):
        assert records == {} and len(answers) == 4


def evaluate_own(world: DistributedContext, case: Case, folders: list[str], name: str) -> Any:
    return evaluate(world, case, folders[world.rank], [name])


@pytest.mark.parametrize("name", NAMES)
def test_ranks_with_different_tasks_do_not_wait_for_each_other(
    gloo_pool: GlooPool, tmp_path: Path, name: str
) -> None:
    folders = []
    for number in (2, 3):
        folder = tmp_path / str(number)
        folder.mkdir()
        folders.append(str(write_tasks(folder, num_capitals=number, prose_words=8 * number)))
    for records, _ in gloo_pool.run(2, evaluate_own, Case(2), folders, name):
        assert records == {}


def rejection(world: DistributedContext, case: Case, tasks: str, names: list[str]) -> str:
    with pytest.raises(ConfigError) as caught:
        evaluate(world, case, tasks, names)
    return str(caught.value)


@pytest.mark.parametrize("case", [Case(2, cp=2), Case(2, pp=2)])
def test_tasks_that_a_mesh_cannot_run_are_named(
    gloo_pool: GlooPool, tasks: str, case: Case
) -> None:
    for text in gloo_pool.run(2, rejection, case, tasks, NAMES):
        assert (
            "evaluation.tasks = " in text
            and '"answers"' in text
            and "`torchtitan evaluate`" in text
        )


# whole runs


def test_it_trains_as_without(tasks: str, tmp_path: Path) -> None:
    """Bit by bit; on two processes the figures are the same."""
    section = [f"--evaluation.tasks={','.join(NAMES)}", f"--evaluation.task_dir={tasks}"]
    section += ["--evaluation.freq=4", "--evaluation.limit=2", "--evaluation.num_fewshot=1"]
    off, on, two = (tmp_path / name for name in ("off", "on", "two"))
    runs.run(off)
    done = runs.run(on, *section, "--metrics.enable_tensorboard")
    rows = [row for row in runs.records(on) if "loss" in row]
    assert [(row["step"], row["loss"], row["grad_norm"]) for row in rows] == runs.curve(off)
    assert rows[4]["evaluation_seconds"] > 0 and "evaluation_seconds" not in rows[5]
    assert "evaluation/capitals/acc: " in done.stderr
    measured = [row for row in runs.records(on) if "loss" not in row]
    assert [row["step"] for row in measured] == [4] * 3 + [8] * 3 + [10] * 3
    perplexity = [v for row in measured for k, v in row.items() if k.endswith("word_perplexity")]
    assert perplexity[0] > perplexity[-1] > 0

    runs.run(two, *section, processes=2)
    again = [row for row in runs.records(two) if "loss" not in row]
    for row, other in zip(again, measured, strict=True):
        assert row == pytest.approx(other, rel=1e-3)


@pytest.mark.fault("F14")
def test_a_stop_during_an_evaluation(tmp_path: Path) -> None:
    """One rank is asked: all leave the evaluation, save and end. The same command goes on, and
    evaluates no step twice."""
    rows = [{"country": str(n), "choices": ["a", "b", "c"], "label": 0} for n in range(9000)]
    tasks, folder, off = write_tasks(tmp_path), tmp_path / "run", tmp_path / "off"
    (tmp_path / "capitals.jsonl").write_text("".join(json.dumps(row) + "\n" for row in rows))
    words = ["--evaluation.tasks=capitals", f"--evaluation.task_dir={tasks}"]
    words += ["--evaluation.freq=5", "--evaluation.batch_size=2", "--checkpoint.interval=4"]
    ranks = runs.start_ranks(folder, *words, folders=[tmp_path, tmp_path])
    with closing(ranks[0]), closing(ranks[1]):
        deadline = time.monotonic() + 200
        while not (folder / "metrics.jsonl").exists() or len(runs.records(folder)) < 5:
            assert time.monotonic() < deadline and ranks[0].poll() is None
            time.sleep(0.1)
        time.sleep(1)
        ranks[1].send_signal(signal.SIGTERM)
        output = ranks[0].wait(100).stderr
        ranks[1].wait(100)
    assert "left the evaluation after step 5" in output, output
    status = runs.status(folder)
    assert (status["status"], status["step"]) == ("preempted", 6)  # fetched before step 5 ended
    assert (folder / "checkpoint" / "step-6").is_dir()
    runs.run(folder, *words, "--evaluation.limit=2", processes=2)
    assert [row["step"] for row in runs.records(folder) if "loss" not in row] == [10]
    runs.run(off, processes=2)
    trained = [row for row in runs.records(folder) if "loss" in row]
    assert [(row["step"], row["loss"], row["grad_norm"]) for row in trained] == runs.curve(off)


def test_the_end_of_the_data_is_evaluated(tasks: str, tmp_path: Path) -> None:
    data = tmp_path / "rows.jsonl"
    data.write_text("".join(f'{{"text": "{"row " * (n % 7 + 1)}{n}"}}\n' for n in range(120)))
    words = ["--training.dataset=json", f"--training.dataset_path={data}", "--data.epochs=1"]
    words += ["--data.lanes=4", "--training.steps=1000", "--evaluation.freq=1000"]
    words += ["--evaluation.tasks=prose", f"--evaluation.task_dir={tasks}"]
    runs.run(tmp_path / "run", *words)
    status = runs.status(tmp_path / "run")
    assert status["status"] == "data_exhausted"
    measured = [row for row in runs.records(tmp_path / "run") if "loss" not in row]
    assert [row["step"] for row in measured] == [status["step"]]


def test_what_is_wrong_is_named_before_the_start(tasks: str, tmp_path: Path) -> None:
    def rejected(*words: str) -> str:
        command = runs.command(tmp_path / "run", *words)
        done = runs.execute(command, runs.environment(), tmp_path)
        assert done.returncode == 2 and not (tmp_path / "run" / "metrics.jsonl").exists()
        return done.stderr

    folder = f"--evaluation.task_dir={tasks}"
    text = rejected("--evaluation.tasks=capitals,answer", folder)
    assert (
        'evaluation.tasks = "answer": is not a task' in text and 'did you mean "answers"?' in text
    )
    text = rejected("--evaluation.tasks=capitals", "--evaluation.task_dir=none")
    assert "evaluation.task_dir = " in text and "is not a folder" in text
    chat = "--evaluation.apply_chat_template"
    text = rejected("--evaluation.tasks=capitals", folder, chat, "--check")
    assert "the chat template: is missing" in text
