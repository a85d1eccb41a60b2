"""lm-eval on meshes: the figures of its own Hugging Face backend, request by request."""

import math
from dataclasses import replace
from pathlib import Path
from typing import Any

import pytest
import torch

from tests.eval_tasks import NAMES, record, write_tasks
from tests.pool import GlooPool
from torchtitan.distributed.context import DistributedContext
from torchtitan.distributed.parallel_dims import ParallelDims

pytest.importorskip("lm_eval", reason="needs the extra eval")

TOLERANCE = 1e-4
MAX_SEQ_LEN = 48
"""Less than some requests have: they are cut, and long texts are read in windows."""


def evaluate(
    world: DistributedContext, folder: str, dims: ParallelDims, choice: Any, batch_size: int
) -> tuple[list[Any], list[Any]]:
    from torchtitan.commands.evaluate import harness_model
    from torchtitan.commands.model_session import ModelSession
    from torchtitan.data.chat_template import read_chat_template
    from torchtitan.evaluation.tasks import load_tasks
    from torchtitan.generation.generate import Generator
    from torchtitan.training.pretrained import describe_pretrained, load_pretrained

    def any_rank(value: bool) -> bool:
        return any(world.gather_json(value))

    found, mesh = describe_pretrained(folder), dims.build_mesh("cpu")
    model = load_pretrained(found, world, mesh, dims, torch.float32)
    args = found.args.model_copy(update={"max_seq_len": MAX_SEQ_LEN})
    found = replace(found, args=args)
    generator = Generator(
        model,
        found.tokenizer.decode,
        MAX_SEQ_LEN,
        world.device,
        any_rank if dims.dp_shard > 1 else bool,
    )
    session = ModelSession(world, dims, mesh, model, generator)
    template = read_chat_template(found.folders) if choice.apply_chat_template else None
    harness = harness_model(session, found, batch_size, template)
    requests = record(harness)
    measures, _ = load_tasks(choice).measure(harness, with_errors=False)
    return requests, measures


@pytest.fixture(scope="module")
def choices(tmp_path_factory: pytest.TempPathFactory) -> list[Any]:
    """Without and with the chat template, and some solved examples."""
    from torchtitan.evaluation.tasks import TaskChoice

    tasks = str(write_tasks(tmp_path_factory.mktemp("eval"), num_capitals=3, prose_words=100))
    plain = TaskChoice(NAMES, tasks, num_fewshot=0)
    chat = replace(plain, names=["capitals", "answers"], num_fewshot=1, apply_chat_template=True)
    return [plain, replace(chat, limit=2)]


@pytest.fixture(scope="module")
def expected(small_smollm2: Path, choices: list[Any]) -> list[tuple[list[Any], list[Any]]]:
    """Requests, answers and figures of lm-eval's own backend."""
    huggingface = pytest.importorskip("lm_eval.models.huggingface")
    from torchtitan.evaluation.tasks import load_tasks

    found = []
    for choice in choices:
        model = huggingface.HFLM(
            str(small_smollm2), dtype="float32", device="cpu", batch_size=4, max_length=MAX_SEQ_LEN
        )
        model.require_same = lambda value: None  # it is alone
        requests = record(model)
        measures, _ = load_tasks(choice).measure(model, with_errors=False)
        found.append((requests, measures))
    return found


def assert_same(found: list[Any], expected: list[Any]) -> None:
    assert [arguments for arguments, _ in found] == [arguments for arguments, _ in expected]
    for (_, answer), (_, other) in zip(found, expected, strict=True):
        if isinstance(other, str):
            assert answer == other
        elif isinstance(other, tuple):
            assert answer[1] == other[1]
            assert math.isclose(answer[0], other[0], rel_tol=0, abs_tol=TOLERANCE)
        else:
            assert math.isclose(answer, other, rel_tol=0, abs_tol=TOLERANCE)


@pytest.mark.parametrize(
    ("number", "dims", "batch_size"),
    [
        (0, ParallelDims(), 4),
        (1, ParallelDims(), 3),
        (0, ParallelDims(tp=3), 8),
        (1, ParallelDims(dp_shard=2), 2),
    ],
)
def test_equals_the_hugging_face_backend(
    gloo_pool: GlooPool,
    small_smollm2: Path,
    choices: list[Any],
    expected: list[Any],
    number: int,
    dims: ParallelDims,
    batch_size: int,
) -> None:
    requests, measures = expected[number]
    assert len({type(answer) for _, answer in requests}) == (3 if number == 0 else 2)
    arguments = str(small_smollm2), dims, choices[number], batch_size
    for of_rank, own_measures in gloo_pool.run(dims.world_size, evaluate, *arguments, timeout=300):
        assert_same(of_rank, requests)
        assert [m[:2] for m in own_measures] == [m[:2] for m in measures]
