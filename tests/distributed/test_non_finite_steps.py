"""A step that is not finite: where it began is found by a second pass, and it may be skipped."""

import json
import os
from pathlib import Path
from subprocess import CompletedProcess

import pytest
import torch
import torch.distributed.checkpoint as dcp

from tests.distributed import runs
from tests.forked import execute
from torchtitan.checkpoint.dcp_io import SafeReader, read_metadata
from torchtitan.checkpoint.steps_folder import step_folders

INJECTOR = """
import torch
import torch.distributed as dist
from torchtitan.config.schema import Section
from torchtitan.handlers.base import ModelHandler
from torchtitan.handlers.registry import handler_settings, register_handler


class _Spoiled(torch.autograd.Function):
    @staticmethod
    def forward(ctx, value):
        return value.view_as(value)

    @staticmethod
    def backward(ctx, gradient):
        gradient = gradient.clone()
        gradient[1, 3] = float("inf")
        return gradient


@register_handler("injector")
class Injector(ModelHandler):
    class Settings(Section):
        module: str = "feed_forward.w2"
        layer: int = 1
        steps: list[int] = [7]
        rank: int = 0
        kind: str = "output"
        once: bool = False
        mask: bool = False

    def __init__(self, job_config, parallel_dims):
        self.settings, self.step = handler_settings(job_config, "injector"), 1

    def after_load(self, model):
        for part in model if isinstance(model, list) else [model]:
            if self.settings.mask:
                part.register_buffer("mask", torch.tensor([0, -torch.inf]))
            for name, module in part.named_modules():
                wanted = f"layers.{self.settings.layer}.{self.settings.module}"
                if name == "output" and self.settings.kind == "logits":
                    module.register_forward_hook(self.enlarge)
                elif name == wanted and dist.get_rank() == self.settings.rank:
                    self.weight, forward = module.weight, module.forward
                    if self.settings.kind == "gradient":
                        module.forward = lambda x: forward(_Spoiled.apply(x) if self.due() else x)
                    elif self.settings.kind == "output":
                        module.register_forward_hook(self.spoil_output)

    def due(self):
        found = self.step in self.settings.steps
        if found and self.settings.once:
            self.settings.steps.remove(self.step)
        return found

    def enlarge(self, module, args, output):
        return output * (1000 if self.due() else 1)

    def spoil_output(self, module, args, output):
        if self.due():
            output = output.clone()
            output[1, 3] = float("nan")
        return output

    def post_optimizer_hook(self, model):
        self.step += 1
        if self.settings.kind == "weight" and self.due():
            with torch.no_grad():
                self.weight[0, 0] = float("nan")
"""


def run(folder: Path, *arguments: str, processes: int = 1) -> CompletedProcess[str]:
    (folder.parent / "injector.py").write_text(INJECTOR)
    injected = ("--model.handlers=injector", "--job.custom_import=injector")
    words = runs.command(folder, *injected, *arguments, processes=processes)
    environment = runs.environment()
    environment["PYTHONPATH"] = os.pathsep.join([str(folder.parent), environment["PYTHONPATH"]])
    return execute(words, env=environment)


def stopped(folder: Path, done: CompletedProcess[str], *texts: str) -> None:
    """The run ended at step 7 with nothing of it saved."""
    assert done.returncode != 0 and folder.exists(), done.stderr
    assert runs.status(folder)["exit_code"] == 5, done.stderr
    for text in ("step 7: the loss or the gradient norm is not finite", *texts):
        assert text in done.stderr, done.stderr
    assert step_folders(folder / "checkpoint") == [4]


SKIP = "--training.on_non_finite=skip"
W2 = "the output of layers.1.feed_forward.w2 is the first that is not finite, on rank"


@pytest.mark.fault("F34")
@pytest.mark.parametrize(
    ("arguments", "where"),
    [
        # Ranks have 4 lanes each and take one sequence of each: 5 is the second one of rank 1.
        ((), "1 in sequence 5 of the step, which begins '"),
        (("--parallelism.tensor_parallel_degree=2",), "1 in sequence 1 of the step"),
        (
            (
                "--parallelism.pipeline_parallel_degree=2",
                "--parallelism.pipeline_parallel_microbatch_size=2",
                "--activation_checkpoint.mode=full",
            ),
            "1 in sequence 1 of the step",
        ),
        (("--parallelism.context_parallel_degree=2",), "1 in sequence 1 of the step"),
    ],
    ids=["fsdp", "tp", "pp", "cp"],
)
def test_the_module_rank_and_sequence_are_named(
    tmp_path: Path, arguments: tuple[str, ...], where: str
) -> None:
    folder = tmp_path / "run"
    done = run(folder, "--handlers.injector.rank=1", *arguments, processes=2)
    stopped(folder, done, f"{W2} {where}", "all weights and optimizer state are finite")


@pytest.mark.fault("F34")
def test_a_gradient_is_followed_to_its_module(tmp_path: Path) -> None:
    folder = tmp_path / "run"
    arguments = ("--handlers.injector.kind=gradient", "--activation_checkpoint.mode=full")
    done = run(folder, *arguments)
    gradient = "the gradient of the input of layers.1.feed_forward.w2 is the first"
    stopped(folder, done, f"{gradient} that is not finite, on rank 0 in sequence 1 of the step")


def test_a_compiled_block_is_looked_into(tmp_path: Path) -> None:
    """A weight is lost after step 6, so skipping would not help."""
    folder = tmp_path / "run"
    compiled = ("--model.handlers=injector,compile", "--handlers.compile.backend=eager")
    done = run(folder, *compiled, "--handlers.injector.kind=weight", SKIP)
    stopped(folder, done, f"{W2} 0 in sequence 0", "hold NaN or infinity: layers.1.feed_forward.w2")


@pytest.mark.fault("F37")
def test_a_fault_that_does_not_come_back(tmp_path: Path) -> None:
    folder = tmp_path / "run"
    done = run(folder, "--handlers.injector.once=true")
    stopped(folder, done, "A second pass over the same batch is finite: the first was changed by a")


@pytest.mark.fault("F34")
def test_a_skipped_step_changes_nothing(tmp_path: Path) -> None:
    """Neither weights nor moments; the schedule and the data go on, also after a resume."""
    folder = tmp_path / "run"
    each = "--checkpoint.interval=1"
    done = run(folder, SKIP, each, "--handlers.injector.rank=1", processes=2)
    assert done.returncode == 0, done.stderr
    assert f"{W2} 1 in sequence 5" in done.stderr
    rows = runs.records(folder)
    assert [row["step"] for row in rows if row["loss"] is None] == [7]
    assert [row.get("skipped_steps", 0) for row in rows] == [0] * 6 + [1] * 4
    before, after, later = (tensors(folder, step) for step in (6, 7, 8))
    assert all(torch.equal(before[name], after[name]) for name in before)
    assert not any(torch.equal(after[name], later[name]) for name in after if "moment" in name)
    arguments = ("--training.steps=11", "--handlers.injector.rank=1")
    more = run(folder, SKIP, each, *arguments, processes=2)
    assert more.returncode == 0, more.stderr
    assert runs.records(folder)[-1]["skipped_steps"] == 1


def tensors(folder: Path, step: int) -> dict[str, torch.Tensor]:
    path = folder / "checkpoint" / f"step-{step}"
    entries = read_metadata(path).state_dict_metadata
    found = {name: torch.empty(entry.size) for name, entry in entries.items()}
    dcp.load(found, storage_reader=SafeReader(path), no_dist=True)
    return found


@pytest.mark.fault("F35")
def test_too_many_in_a_row_end_the_run(tmp_path: Path) -> None:
    """Three with a finite one among them do not; nor does a mask that is part of the model."""
    folder = tmp_path / "run"
    steps = ("--handlers.injector.steps=[1,2,4,5,7,8,9]", "--handlers.injector.mask=true")
    done = run(folder, SKIP, "--training.max_skipped_steps=2", *steps)
    assert runs.status(folder)["exit_code"] == 5, done.stderr
    assert "step 9: the loss or the gradient norm is not finite" in done.stderr
    assert "training.max_skipped_steps = 2" in done.stderr
    assert step_folders(folder / "checkpoint") == [4, 8]


@pytest.mark.fault("F36")
@pytest.mark.parametrize("skips", [False, True])
def test_a_loss_spike_is_reported_or_skipped(tmp_path: Path, skips: bool) -> None:
    folder = tmp_path / "run"
    window = ("--training.loss_spike_window=8", "--training.loss_spike_threshold=50")
    action = f"--training.on_loss_spike={'skip' if skips else 'report'}"
    arguments = ("--handlers.injector.kind=logits", *window, action, "--checkpoint.interval=1")
    done = run(folder, *arguments, "--training.steps=7")
    assert done.returncode == 0, done.stderr
    assert "step 7: the loss" in done.stderr and "is a spike" in done.stderr
    assert ("Its update was left out" in done.stderr) == skips
    assert runs.records(folder)[6].get("skipped_steps", 0) == skips
    before, after = tensors(folder, 6), tensors(folder, 7)
    assert skips == all(torch.equal(before[name], after[name]) for name in before)
    assert run(folder, *arguments).returncode == 0  # goes on with the losses of the first start
    curve = [row["loss"] for row in runs.records(folder)]
    state = json.loads((folder / "checkpoint/step-10/manifest.json").read_text())["state"]
    assert state["recent_losses"] == pytest.approx(curve[-8:])
