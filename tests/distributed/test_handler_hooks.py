"""When handlers' hooks are called in a run, and what becomes of one in which a hook fails."""

import hashlib
import json
import subprocess
import sys
from collections.abc import Iterator
from dataclasses import dataclass, replace
from pathlib import Path
from typing import Any

import pytest
from torch import nn
from torch.distributed.tensor import DTensor

from tests.distributed import runs
from tests.pool import GlooPool
from torchtitan.checkpoint.run_folder import RunFolder
from torchtitan.config import JobConfig
from torchtitan.config.run_context import RunContext
from torchtitan.distributed.context import DistributedContext
from torchtitan.handlers.base import ModelHandler
from torchtitan.handlers.registry import HANDLERS, register_handler
from torchtitan.training.run import Progress, train

STEPS = 3
MAX_NORM = 0.01
"""Below the norms that occur, so that clipping acts."""


@dataclass
class Call:
    """What a hook saw."""

    hook: str
    parts: int
    weights: str
    """A digest."""
    norm: float | None
    """Of this rank's gradients; None if it has none."""


CALLS: list[Call] = []


class Counting(ModelHandler):
    """Notes each call."""

    def __init__(self, job_config: JobConfig, parallel_dims: Any):
        CALLS.append(Call("init", 0, "", None))

    def convert(self, model: nn.Module) -> None:
        assert all(tensor.is_meta for tensor in model.parameters())
        CALLS.append(Call("convert", 1, "", None))

    def after_load(self, model: nn.Module | list[nn.Module]) -> None:
        self._note("after_load", model)

    def pre_optimizer_hook(self, model: nn.Module | list[nn.Module]) -> None:
        self._note("pre", model)

    def post_optimizer_hook(self, model: nn.Module | list[nn.Module]) -> None:
        self._note("post", model)

    def _note(self, hook: str, model: nn.Module | list[nn.Module]) -> None:
        parts = model if isinstance(model, list) else [model]
        digest, squares = hashlib.sha256(), []
        for part in parts:
            for _, tensor in part.named_parameters():
                assert isinstance(tensor, DTensor)
                digest.update(tensor.detach().to_local().numpy().tobytes())
                if tensor.grad is not None:
                    squares.append(tensor.grad.to_local().square().sum().item())
        norm = sum(squares) ** 0.5 if squares else None
        CALLS.append(Call(hook, len(parts), digest.hexdigest(), norm))


def calls_in_a_run(
    world: DistributedContext, folder: str, sections: dict[str, dict[str, Any]]
) -> list[Call]:
    """Of the training loop itself, on this rank."""
    CALLS.clear()
    before = dict(HANDLERS._registered)
    register_handler("counting")(Counting)
    values: dict[str, dict[str, Any]] = {
        "job": {"dump_folder": folder},
        "model": {"handlers": ["counting"], "args": {"n_layers": 4, "dim": 32, "n_heads": 4}},
        "lr_scheduler": {"warmup_steps": 1},
        **sections,
    }
    values["training"] = {
        "dataset": "stdlib",
        "seq_len": 32,
        "local_batch_size": 2,
        "global_batch_size": 8,
        "steps": STEPS,
        "max_norm": MAX_NORM,
        "mixed_precision_param": "float32",
        **sections.get("training", {}),
    }
    config = JobConfig.model_validate(values)
    context = RunContext(config, world.world_size, "cpu")
    opened = RunFolder.open(config, context, world.is_main)
    try:
        opened.share(world)
        progress = Progress()
        train(replace(context, config=opened.config), world, opened, progress)
    finally:
        opened.close()
        HANDLERS._registered = before
    assert progress.status == "completed"
    return list(CALLS)


PIPELINE = {"pipeline_parallel_degree": 2, "pipeline_parallel_microbatch_size": 1}


@pytest.mark.parametrize(
    ("sections", "parts"),
    [
        pytest.param({"training": {"local_batch_size": 1}}, 1, id="accumulation"),
        pytest.param({"parallelism": PIPELINE}, 1, id="pipeline"),
        pytest.param(
            {"parallelism": {**PIPELINE, "pipeline_parallel_schedule": "Interleaved1F1B"}},
            2,
            id="stages",
        ),
    ],
)
def test_once_a_step_around_the_optimizer(
    sections: dict[str, Any], parts: int, gloo_pool: GlooPool, tmp_path: Path
) -> None:
    """Four microbatches of a rank and step, or more, make one update."""
    for calls in gloo_pool.run(2, calls_in_a_run, str(tmp_path / "run"), sections):
        names = [call.hook for call in calls]
        assert names == ["init", "convert", "after_load"] + ["pre", "post"] * STEPS
        around = calls[2:]
        assert {call.parts for call in around} == {parts}
        for earlier, pre, post in zip(around[::2], around[1::2], around[2::2], strict=False):
            assert pre.weights == earlier.weights, "nothing has changed since the last hook"
            assert post.weights != pre.weights, "the optimizer's step is between the two"
            assert pre.norm is not None and 0 < pre.norm <= MAX_NORM * 1.001, "clipped"
            assert post.norm == pre.norm


def test_once_a_step_where_steps_are_made_in_the_backward(
    gloo_pool: GlooPool, tmp_path: Path
) -> None:
    sections = {"optimizer": {"early_step_in_backward": True}, "training": {"max_norm": 1e9}}
    sections["training"]["global_batch_size"] = 4
    for calls in gloo_pool.run(2, calls_in_a_run, str(tmp_path / "run"), sections):
        assert [call.hook for call in calls[2:]] == ["after_load"] + ["pre", "post"] * STEPS
        for earlier, pre, post in zip(calls[2::2], calls[3::2], calls[4::2], strict=False):
            assert pre.weights != earlier.weights and pre.norm is None
            assert post.weights == pre.weights


FAILING = """
import torch

from torchtitan.config import ConfigError, ConfigIssue
from torchtitan.config.schema import Section
from torchtitan.handlers.base import ModelHandler
from torchtitan.handlers.registry import handler_settings, register_handler

ERRORS = {
    "own": ValueError("out of ideas"),
    "memory": torch.OutOfMemoryError("CUDA out of memory"),
    "user": ConfigError(ConfigIssue("model.handlers", "is out of luck", "mend it", "failing")),
}
ERRORS["late"] = ERRORS["user"]


@register_handler("failing")
class Failing(ModelHandler):
    class Settings(Section):
        hook: str = ""
        error: str = "own"

    def __init__(self, job_config, parallel_dims):
        self.settings, self.calls = handler_settings(job_config, "failing"), 0
        self.fail("__init__")

    def fail(self, hook):
        if not torch.distributed.is_initialized():
            return  # the check looks at the model
        if hook == self.settings.hook and self.settings.error == "late" and not self.calls:
            self.calls += 1
        elif hook == self.settings.hook:
            raise ERRORS[self.settings.error]

    def convert(self, model):
        self.fail("convert")

    def extend_tp_plan(self, plan):
        self.fail("extend_tp_plan")

    def after_load(self, model):
        self.fail("after_load")

    def pre_optimizer_hook(self, model):
        self.fail("pre_optimizer_hook")

    def post_optimizer_hook(self, model):
        self.fail("post_optimizer_hook")
"""
HOOKS = (
    "__init__",
    "convert",
    "extend_tp_plan",
    "after_load",
    "pre_optimizer_hook",
    "post_optimizer_hook",
)
RUNS = [(hook, "own", 1) for hook in HOOKS]
RUNS += [("convert", "memory", 8), ("post_optimizer_hook", "memory", 8)]
RUNS += [("extend_tp_plan", "user", 2), ("pre_optimizer_hook", "user", 2)]
RUNS += [("post_optimizer_hook", "late", 2)]
IN_TURN = """
import json, os, sys

from torchtitan import cli

arguments, folder, runs, ports = json.loads(sys.argv[1])
for (hook, error, _), port in zip(runs, ports):
    os.environ["MASTER_PORT"] = port
    print("RUN", hook, error, file=sys.stderr, flush=True)
    settings = [f"--handlers.failing.hook={hook}", f"--handlers.failing.error={error}"]
    settings.append(f"--job.dump_folder={folder}/{hook}-{error}")
    status = cli.main(["train", *arguments, *settings])
    print("STATUS", status, file=sys.stderr, flush=True)
"""


@pytest.fixture(scope="module")
def failed(tmp_path_factory: pytest.TempPathFactory) -> Iterator[tuple[Path, list[str]]]:
    """The folder of runs of two processes that fail, each in its way, and what the ranks wrote.
    No launcher looks after them: each process ends each run by itself."""
    folder = tmp_path_factory.mktemp("failing")
    (folder / "failing.py").write_text(FAILING)
    words = runs.command(folder / "unused", "--parallelism.tensor_parallel_degree=2")
    arguments = [word for word in words[3:] if "dump_folder" not in word]
    arguments += ["--job.custom_import=failing", "--model.handlers=failing"]
    variables = [runs.launcher_variables(2) for _ in RUNS]
    ports = [ranks[0]["MASTER_PORT"] for ranks in variables]
    environment = runs.environment()
    environment["PYTHONPATH"] += f":{folder}"
    outputs = [folder / f"stderr-{rank}" for rank in range(2)]  # a pipe would fill up, and block
    processes = [
        subprocess.Popen(
            [sys.executable, "-c", IN_TURN, json.dumps([arguments, str(folder), RUNS, ports])],
            env=environment | variables[0][rank],
            stderr=output.open("w"),
        )
        for rank, output in enumerate(outputs)
    ]
    try:
        for process in processes:
            process.wait(timeout=240)
        yield folder, [output.read_text() for output in outputs]
    finally:
        for process in processes:
            process.kill()
            process.wait()


def test_an_error_in_a_hook_ends_the_run_on_all_ranks(failed: tuple[Path, list[str]]) -> None:
    """With whose it is, and the exit status of its kind."""
    folder, outputs = failed
    for output in outputs:
        texts = output.split("RUN ")[1:]
        assert len(texts) == len(RUNS), output
        for (hook, error, status), text in zip(RUNS, texts, strict=True):
            assert text.startswith(f"{hook} {error}\n")
            assert f"STATUS {status}\n" in text, text
            told = {
                "own": f"the handler failing (failing), in {hook}: ValueError: out of ideas",
                "memory": f"the handler failing (failing), in {hook}: OutOfMemoryError: CUDA",
                "user": 'model.handlers = "failing": is out of luck. Fix: mend it.',
                "late": 'ERROR: model.handlers = "failing": is out of luck. Fix: mend it.',
            }[error]
            assert told in text, text
            assert ('failing.py", line' in text) == (error == "own"), "the traceback leads there"
            assert ("nothing was started" in text) == (error == "user")
            stored = runs.status(folder / f"{hook}-{error}")
            assert (stored["status"], stored["exit_code"]) == ("failed", status)
