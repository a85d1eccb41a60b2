"""The loss of a validation set is the same on every mesh, and measuring it changes no training."""

import json
import math
import signal
from contextlib import contextmanager
from dataclasses import replace
from pathlib import Path
from typing import Any, NamedTuple

import pytest
import torch
import torch.nn.functional as F

from tests.distributed import runs
from tests.distributed.test_runs import start_and_signal
from tests.distributed.tiny import Case
from tests.pool import GlooPool
from torchtitan.config.run_context import RunContext
from torchtitan.config.toml_text import toml_value
from torchtitan.data.tokenizers import build_tokenizer
from torchtitan.distributed.context import DistributedContext
from torchtitan.distributed.parallel_dims import ParallelDims
from torchtitan.models.batch import IGNORE_INDEX
from torchtitan.training import builder, model_builder
from torchtitan.utils.garbage import GarbageCollection
from torchtitan.utils.processes import StopRequest

TOLERANCE = 1e-12
COMPILED = {
    "model": {"handlers": ["compile"]},
    "handlers": {"compile": {"backend": "aot_eager"}},
}
CASES = {
    "one process": Case(),
    "one process, masked": Case(document_mask=True),
    "fsdp 3": Case(3),
    "fsdp 3, masked": Case(3, document_mask=True),
    "ddp 2": Case(2, replicate=2, shard=1),
    "tp 2": Case(2, tp=2),
    "cp 2, masked": Case(2, cp=2, document_mask=True),
    "pp 2, masked": Case(2, pp=2, document_mask=True),
    "fsdp 2, pp 2": Case(4, pp=2),
    "compiled, fsdp 2": Case(2, settings=COMPILED),
}


def write_sets(folder: Path) -> list[dict[str, Any]]:
    """Two sets: one of few documents, so that most ranks run out of it, and a larger one."""
    sets = []
    for name, count in (("few", 5), ("more", 40)):
        path = folder / f"{name}.jsonl"
        texts = [f"document {n} " + "of words " * (n % 9) for n in range(count)]
        path.write_text("".join(json.dumps({"text": text}) + "\n" for text in texts))
        sets.append({"name": name, "dataset": "json", "dataset_path": str(path)})
    return sets


class Recorded(NamedTuple):
    loss: float
    num_targets: int


class Records:
    """In place of the metrics."""

    def __init__(self) -> None:
        self.of_sets: dict[str, Recorded] = {}

    @contextmanager
    def timing(self, name: str):
        assert name == "validation"
        yield

    def log_validation(
        self,
        step: int,
        name: str,
        loss: torch.Tensor,
        num_targets: int,
        has_perplexity: bool,
        loss_terms: dict[str, torch.Tensor],
    ) -> None:
        assert step == 7 and has_perplexity and not loss_terms
        self.of_sets[name] = Recorded(loss.item(), num_targets)


def validate(
    world: DistributedContext, case: Case, sets: list[dict[str, Any]], stopping_rank: int = -1
) -> dict[str, Recorded]:
    """What is logged of the initial model; collective."""
    torch._dynamo.reset()
    section = {"enable": True, "sets": sets, "local_batch_size": 2}
    config = replace(case, settings={**case.settings, "validation": section}).config()
    context = RunContext(config, world.world_size, "cpu")
    dims = ParallelDims.from_section(context.config.parallelism, context.world_size)
    mesh = dims.build_mesh("cpu")
    tokenizer = build_tokenizer("bytes")
    model = model_builder.build_model(config, tokenizer.vocab_size, mesh, dims, world.device)
    runner = builder.build_runner(config, model, mesh, dims, world.device)
    records: Any = Records()
    stop = StopRequest()
    stop.requested = world.rank == stopping_rank
    validator = builder.build_validator(
        context, dims, world, tokenizer, runner, stop, GarbageCollection(50)
    )
    validator.run(7, records)
    return records.of_sets


def count_plainly(
    world: DistributedContext, case: Case, sets: list[dict[str, Any]]
) -> dict[str, Recorded]:
    """The same from one sequence at a time and the formula, without runner and validator."""
    section = {"enable": True, "sets": sets, "local_batch_size": 1}
    config = replace(case, settings={"validation": section}).config()
    dims = ParallelDims.from_section(config.parallelism, 1)
    mesh = dims.build_mesh("cpu")
    tokenizer = build_tokenizer("bytes")
    model = model_builder.build_model(config, tokenizer.vocab_size, mesh, dims, world.device)
    names = ["tokens", "positions"] + ["document_ids"] * case.document_mask
    result = {}
    for named in builder.validation_sets(config):
        reader = builder.build_reader(
            named, tokenizer, num_lanes=None, max_sequences=None, dp_degree=1, dp_rank=0
        )
        steps, losses = reader.start(), []
        while not (data := steps.next_step()).ended:
            (batch,) = data.microbatches
            with torch.no_grad():
                hidden = model.parts[0](**{name: batch[name] for name in names})
                logits = model.parts[0].head(hidden)  # type: ignore[operator]
            each = F.cross_entropy(
                logits[0], batch["labels"][0], ignore_index=IGNORE_INDEX, reduction="none"
            )
            losses += each[batch["labels"][0] != IGNORE_INDEX].tolist()
        result[named.name] = Recorded(math.fsum(losses) / len(losses), len(losses))
    return result


@pytest.fixture(scope="module")
def sets(tmp_path_factory: pytest.TempPathFactory) -> list[dict[str, Any]]:
    return write_sets(tmp_path_factory.mktemp("sets"))


@pytest.fixture(scope="module")
def expected(gloo_pool: GlooPool, sets: list[dict[str, Any]]) -> dict[bool, dict[str, Recorded]]:
    """By whether documents are masked."""
    return {
        mask: gloo_pool.run(1, count_plainly, Case(document_mask=mask), sets)[0]
        for mask in (False, True)
    }


@pytest.mark.parametrize("name", CASES)
def test_the_same_loss_on_every_mesh(
    name: str,
    gloo_pool: GlooPool,
    sets: list[dict[str, Any]],
    expected: dict[bool, dict[str, Recorded]],
) -> None:
    case = CASES[name]
    for records in gloo_pool.run(case.world_size, validate, case, sets):
        assert records.keys() == {"few", "more"}
        for key, (loss, num_targets) in records.items():
            assert num_targets == expected[case.document_mask][key].num_targets
            assert loss == pytest.approx(expected[case.document_mask][key].loss, rel=TOLERANCE)


@pytest.mark.fault("F14")
def test_a_rank_that_is_asked_to_stop_ends_it_for_all(
    gloo_pool: GlooPool, sets: list[dict[str, Any]]
) -> None:
    assert gloo_pool.run(3, validate, Case(3), sets, 1) == [{}, {}, {}]


# whole runs

KEYS = ("validation/few/loss", "validation/more/loss")


@pytest.fixture
def validation(tmp_path: Path) -> tuple[str, ...]:
    """Arguments that switch it on."""
    sets = toml_value(write_sets(tmp_path))
    return "--validation.enable", f"--validation.sets={sets}"


def split(folder: Path) -> tuple[list[dict[str, Any]], dict[int, list[float]]]:
    """The records of steps, and the losses of each validation by its step."""
    rows = runs.records(folder)
    validations: dict[int, list[float]] = {}
    for row in rows:
        for key in KEYS:
            if key in row:
                perplexity = row[key.replace("loss", "perplexity")]
                assert perplexity == pytest.approx(math.exp(row[key]))
                validations.setdefault(row["step"], []).append(row[key])
    return [row for row in rows if "loss" in row], validations


def test_run_with_validation(validation: tuple[str, ...], tmp_path: Path) -> None:
    """It trains as without, bit by bit; killed and resumed on two processes, it measures the same
    as uninterrupted."""
    validation = (*validation, "--validation.freq=3")
    off, on, resumed = (tmp_path / name for name in ("off", "on", "resumed"))
    runs.run(off)
    done = runs.run(on, *validation, "--metrics.enable_tensorboard")
    rows, validations = split(on)
    curve = [(row["step"], row["loss"], row["grad_norm"]) for row in rows]
    assert curve == runs.curve(off)
    assert list(validations) == [3, 6, 9, 10]
    assert [len(losses) for losses in validations.values()] == [2] * 4
    assert validations[10][0] < validations[3][0]
    assert rows[3]["validation_seconds"] > 0 and "validation_seconds" not in rows[4]
    assert "validation/few/loss: " in done.stderr and "validation/more/perplexity: " in done.stderr

    start_and_signal(resumed, signal.SIGKILL, *validation, "--checkpoint.interval=1")
    done = runs.run(resumed, *validation, processes=2)
    assert "Resumed from step " in done.stderr
    _, again = split(resumed)
    assert list(again) == list(validations)
    for step, losses in validations.items():
        assert again[step] == pytest.approx(losses, rel=2e-5)


def test_the_last_step_of_finite_data_is_validated(
    validation: tuple[str, ...], tmp_path: Path
) -> None:
    folder = tmp_path / "run"
    data = tmp_path / "rows.jsonl"
    data.write_text("".join(f'{{"text": "{"row " * (n % 7 + 1)}{n}"}}\n' for n in range(120)))
    arguments = ("--training.dataset=json", f"--training.dataset_path={data}", "--data.epochs=1")
    lanes = ("--data.lanes=4", "--training.steps=1000", "--validation.freq=1000")
    runs.run(folder, *validation, *arguments, *lanes)
    status = runs.status(folder)
    assert status["status"] == "data_exhausted"
    assert list(split(folder)[1]) == [status["step"]]
