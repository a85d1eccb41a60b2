"""What is not finite is neither saved nor gone on from, whoever made it so; exit status 5."""

import os
from pathlib import Path
from subprocess import CompletedProcess

import pytest
import torch

from tests.distributed import runs
from tests.forked import execute
from torchtitan.checkpoint.steps_folder import step_folders

SPOILER = """
import torch, torch.distributed as dist
from torch.distributed.tensor import DTensor
from torchtitan.config.schema import Section
from torchtitan.handlers.base import ModelHandler
from torchtitan.handlers.registry import handler_settings, register_handler

@register_handler("spoiler")
class Spoiler(ModelHandler):
    class Settings(Section):
        at_step: int = 8
        value: float = 0.0

    def __init__(self, job_config, parallel_dims):
        self.settings, self.step = handler_settings(job_config, "spoiler"), 0

    @torch.no_grad()
    def post_optimizer_hook(self, model):
        self.step += 1
        if self.step == self.settings.at_step and dist.get_rank() == dist.get_world_size() - 1:
            weight = model.layers["0"].attention.wq.weight
            weight.to_local()[0, 0] = self.settings.value or float("nan")
"""
SPOILED = ("--model.handlers=spoiler", "--job.custom_import=spoiler")
EIGHT = "--training.steps=8"
NAME = "layers.0.attention.wq.weight"


def run(folder: Path, *arguments: str, processes: int = 1, code: str = "") -> CompletedProcess[str]:
    """A run with the handler at hand; `code` precedes it in the process."""
    (folder.parent / "spoiler.py").write_text(SPOILER)
    words = runs.command(folder, *arguments, processes=processes)
    if code:
        main = "import sys\nfrom torchtitan.cli import main\nsys.exit(main(sys.argv[1:]))"
        words = [words[0], "-c", f"{code}\n{main}", "train", *words[3:]]
    environment = runs.environment()
    environment["PYTHONPATH"] = os.pathsep.join([str(folder.parent), environment["PYTHONPATH"]])
    return execute(words, env=environment)


def refused(folder: Path, done: CompletedProcess[str], *words: str, steps: list[int]) -> None:
    assert done.returncode != 0, done.stderr
    assert (folder / "run_status.json").exists(), done.stderr
    status = runs.status(folder)
    assert (status["status"], status["exit_code"]) == ("failed", 5), done.stderr
    for word in words:
        assert word in done.stderr
    assert "sound" not in done.stderr and "unharmed" not in done.stderr
    assert step_folders(folder / "checkpoint") == steps
    assert not list((folder / "checkpoint").glob(".tmp-*"))


@pytest.mark.fault("F34")
def test_an_update_that_overflows_is_not_saved(tmp_path: Path) -> None:
    """The loss of step 1 is finite; what it makes of the weights is not."""
    folder = tmp_path / "run"
    overflows = ("--optimizer.lr=3e38", "--lr_scheduler.warmup_steps=1")
    each_step = "--checkpoint.interval=1"
    words = "step 1 is not saved", "NaN or infinity", "No checkpoint of this run is saved"
    for _ in range(2):  # the same command begins anew, and does not go on from what is spoilt
        refused(folder, run(folder, *overflows, each_step), *words, steps=[])
    found = "step 2: the loss or the gradient norm", "but these hold NaN or infinity: tok_embedd"
    refused(folder, run(folder, *overflows), *found, words[2], steps=[])


@pytest.mark.fault("F34")
@pytest.mark.parametrize(
    ("arguments", "processes"),
    [
        (("--checkpoint.async_mode=async",), 2),
        (("--checkpoint.last_save_model_only",), 1),
        (("--parallelism.tensor_parallel_degree=2",), 2),
    ],
    ids=str,
)
def test_a_hook_that_spoils_the_last_step(
    tmp_path: Path, arguments: tuple[str, ...], processes: int
) -> None:
    """On the last rank alone; all agree, and the same run goes on from the step before."""
    folder = tmp_path / "run"
    done = run(folder, *SPOILED, EIGHT, *arguments, processes=processes)
    words = f"step 8 is not saved because these hold NaN or infinity: {NAME}. Lower"
    refused(folder, done, words, "The newest checkpoint is step 4, which was", steps=[4])
    again = run(folder, *SPOILED, EIGHT, *arguments, processes=processes)  # its hook counts from 0
    assert again.returncode == 0 and "Resumed from step 4" in again.stderr
    assert step_folders(folder / "checkpoint") == [4, 8]


@pytest.mark.fault("F34")
def test_a_step_that_is_not_finite_is_not_resumed_from(tmp_path: Path) -> None:
    folder = tmp_path / "run"
    careless = (
        "import torchtitan.checkpoint.state as state\nstate.non_finite_on_any_rank = lambda *_: []"
    )
    spoiled = (*SPOILED, "--training.steps=12", "--handlers.spoiler.at_step=7")
    done = run(folder, *spoiled, "--checkpoint.interval=7", code=careless)
    assert done.returncode == 5 and step_folders(folder / "checkpoint") == [7]
    words = f"step-7 cannot be trained: these hold NaN or infinity: {NAME}. It is moved aside"
    refused(folder, run(folder, *spoiled), words, steps=[])
    (aside,) = (folder / "checkpoint").glob("quarantine-step-7*")
    new = run(tmp_path / "new", f"--checkpoint.initial_load_path={aside}")
    refused(tmp_path / "new", new, "Set checkpoint.initial_load_path to other weights", steps=[])


def test_an_export_that_overflows_is_saved_in_its_own_type(tmp_path: Path) -> None:
    folder = tmp_path / "run"
    export = ("--checkpoint.last_save_model_only", "--checkpoint.export_dtype=float16")
    done = run(folder, *SPOILED, EIGHT, *export, "--handlers.spoiler.value=1e5")
    assert done.returncode == 0, done.stderr
    assert f"export_dtype = float16 cannot hold all values of {NAME}" in done.stderr
    again = run(tmp_path / "new", f"--checkpoint.initial_load_path={folder / 'checkpoint/step-8'}")
    assert again.returncode == 0 and "Weights are converted" not in again.stderr


def test_initial_weights_that_are_not_finite_are_no_seed(tmp_path: Path) -> None:
    folder = tmp_path / "run"
    code = (
        "from torchtitan.models.decoder.model import Decoder, InitRule\n"
        f"Decoder.init_rule = lambda self, name: InitRule('constant', value={torch.inf!r})"
    )
    code = code.replace("inf)", "float('inf'))")
    done = run(folder, "--checkpoint.create_seed_checkpoint", code=code)
    refused(folder, done, "step 0 is not saved", "Look at the model's init_rule", steps=[])
