"""A handler that changes plain weights as a run starts from them, part by part."""

import os
import re
from pathlib import Path
from typing import Any

import pytest
from torch import Tensor
from torch.distributed.tensor import DTensor

from tests.distributed import runs
from tests.faults.saving import RUN_ID, Trainer
from tests.forked import execute
from tests.pool import GlooPool
from torchtitan.checkpoint.initial_load import InitialLoad
from torchtitan.checkpoint.state import model_tensors
from torchtitan.checkpoint.store import CheckpointStore
from torchtitan.config import JobConfig
from torchtitan.config.schema import Checkpoint
from torchtitan.distributed.context import DistributedContext
from torchtitan.distributed.parallel_dims import ParallelDims
from torchtitan.handlers.base import ModelHandler
from torchtitan.handlers.named import HandlerError, NamedHandler
from torchtitan.handlers.registry import HANDLERS, register_handler

STATE = {"step": 1, "num_tokens_seen": 0, "lane_states": None, "data_fingerprint": None}


class Halving(ModelHandler):
    """Keeps biases as they are."""

    def __init__(self, job_config: JobConfig, parallel_dims: Any):
        self.seen: dict[str, list[int]] = {}

    def transform_loaded(self, name: str, tensor: Tensor) -> Tensor:
        self.seen[name] = list(tensor.shape)
        return tensor if name.endswith("bias") else tensor / 2


class Cutting(Halving):
    def transform_loaded(self, name: str, tensor: Tensor) -> Tensor:
        return tensor[:0]


def save(world: DistributedContext, folder: str, handlers: list[str] | None) -> None:
    trainer = Trainer(world)
    trainer.train_step(1)
    info: dict[str, Any] = {"run_id": RUN_ID}
    if handlers is not None:
        info["config"] = {"model": {"handlers": handlers}}
    store = CheckpointStore(Checkpoint(enable=True), Path(folder), world, info)
    store.save(1, trainer.tensors(), STATE, model_only=False)


def load(
    world: DistributedContext, path: str, cut: str, kind: type, section: dict[str, Any]
) -> dict[str, Any]:
    """What a handler of `kind` makes of the weights, and what it was shown."""
    before = dict(HANDLERS._registered)
    register_handler("halving")(kind)
    try:
        handler = NamedHandler("halving", JobConfig(), ParallelDims())
        with_it, without = Trainer(world, seed=9, cut=cut), Trainer(world, seed=9, cut=cut)
        for trainer, handlers in ((with_it, [handler]), (without, [])):
            initial = InitialLoad(Checkpoint(initial_load_path=path, **section), world)
            optimizer = {k: v for k, v in trainer.tensors().items() if k.startswith("optimizer.")}
            initial.load(model_tensors([trainer.model]), optimizer, handlers)
    except HandlerError as error:
        return {"error": str(error)}
    finally:
        HANDLERS._registered = before
    halved, plain = (model_tensors([trainer.model]) for trainer in (with_it, without))
    return {
        "shapes": {name: list(_local(tensor).shape) for name, tensor in plain.items()},
        "seen": handler.handler.seen,  # type: ignore[attr-defined]
        "factors": {
            name: (_whole(halved[name]) / _whole(tensor)).unique().tolist()
            for name, tensor in plain.items()
        },
    }


def _local(tensor: Tensor) -> Tensor:
    return tensor.to_local() if isinstance(tensor, DTensor) else tensor


def _whole(tensor: Tensor) -> Tensor:
    return tensor.full_tensor() if isinstance(tensor, DTensor) else tensor


@pytest.mark.parametrize("cut", ["shard", "tensor"])
@pytest.mark.parametrize("handlers", [None, [], ["freeze"]])
def test_each_part_once(
    gloo_pool: GlooPool, tmp_path: Path, cut: str, handlers: list[str] | None
) -> None:
    gloo_pool.run(1, save, str(tmp_path), handlers)
    for found in gloo_pool.run(2, load, str(tmp_path / "step-1"), cut, Halving, {}):
        assert found["seen"] == found["shapes"]
        assert found["factors"] == {"0.weight": [0.5], "0.bias": [1.0], "1.weight": [0.5]}


@pytest.mark.parametrize(
    ("handlers", "section"),
    [(["freeze", "halving"], {}), ([], {"initial_load_model_only": False})],
    ids=["of-a-run-that-had-it", "the-whole-run"],
)
def test_what_is_no_news_to_it(
    gloo_pool: GlooPool, tmp_path: Path, handlers: list[str], section: dict[str, Any]
) -> None:
    gloo_pool.run(1, save, str(tmp_path), handlers)
    for found in gloo_pool.run(2, load, str(tmp_path / "step-1"), "shard", Halving, section):
        assert found["seen"] == {}
        assert set(map(tuple, found["factors"].values())) == {(1.0,)}


def test_another_shape_is_refused(gloo_pool: GlooPool, tmp_path: Path) -> None:
    gloo_pool.run(1, save, str(tmp_path), None)
    for found in gloo_pool.run(2, load, str(tmp_path / "step-1"), "shard", Cutting, {}):
        assert "the handler halving" in found["error"] and "transform_loaded" in found["error"]


MODULE = """
import torch

from torchtitan.handlers.base import ModelHandler
from torchtitan.handlers.registry import register_handler


@register_handler("negating")
class Negating(ModelHandler):
    def __init__(self, job_config, parallel_dims):
        self.calls = 0

    def transform_loaded(self, name, tensor):
        self.calls += 1
        return -tensor if name == "norm.weight" else tensor

    def after_load(self, model):
        mean = model.get_parameter("norm.weight").full_tensor().mean().item()
        rank = torch.distributed.get_rank()
        print(f"LOADED {rank} {self.calls} {mean:.3f}", flush=True)
"""


def test_in_a_run(tmp_path: Path) -> None:
    """On two ranks that cut the matrices, from weights of one that knew nothing of the handler; not
    again on a resume. With a learning rate of 0 the weights are what they were."""
    runs.run(tmp_path / "plain", "--training.steps=1", "--lr_scheduler.warmup_steps=0")
    (tmp_path / "negating.py").write_text(MODULE)
    environment = runs.environment()
    environment["PYTHONPATH"] = os.pathsep.join([str(tmp_path), environment["PYTHONPATH"]])

    def loaded(*more: str) -> set[str]:
        words = runs.command(
            tmp_path / "run",
            f"--checkpoint.initial_load_path={tmp_path / 'plain' / 'checkpoint' / 'step-1'}",
            "--job.custom_import=negating",
            "--model.handlers=negating",
            "--parallelism.tensor_parallel_degree=2",
            "--optimizer.lr=0.0",
            "--lr_scheduler.warmup_steps=0",
            *more,
            processes=2,
        )
        done = execute(words, env=environment)
        assert done.returncode == 0, done.stderr
        # The ranks write into one pipe, so their lines may run into each other.
        return set(re.findall(r"LOADED \d \d+ -?\d\.\d{3}", done.stdout))

    tensors = 2 * 9 + 3
    assert loaded("--training.steps=1") == {f"LOADED {rank} {tensors} -1.000" for rank in (0, 1)}
    assert loaded("--training.steps=2") == {f"LOADED {rank} 0 -1.000" for rank in (0, 1)}
