"""Memory options on a GPU: the losses stay, and memory is saved. `pytest -m gpu`."""

from pathlib import Path

import pytest
import torch

from tests.distributed import runs

pytestmark = [
    pytest.mark.gpu,
    pytest.mark.skipif(not torch.cuda.is_available(), reason="needs a GPU"),
]

LARGE = (
    "--job.device=cuda",
    "--checkpoint.enable=false",
    "--training.max_norm=inf",
    "--training.global_batch_size=8",
    "--training.local_batch_size=8",
    "--activation_checkpoint.mode=none",
)
WIDE = (*LARGE, "--model.args.dim=1024", "--model.args.n_layers=8", "--training.seq_len=64")
LONG = (*LARGE, "--model.args.dim=256", "--model.args.n_layers=16", "--training.seq_len=1024")


def peak(folder: Path) -> float:
    """GiB of tensors at most, after the first steps, in which there is no optimizer state yet."""
    return max(record["memory_active_gib"] for record in runs.records(folder)[2:])


@pytest.mark.parametrize(
    ("shape", "options"),
    [
        (WIDE, ("--training.enable_cpu_offload=true",)),
        (WIDE, ("--optimizer.early_step_in_backward=true",)),
        (
            WIDE,
            ("--training.enable_cpu_offload=true", "--optimizer.early_step_in_backward=true"),
        ),
        (LONG, ("--activation_checkpoint.offload=true",)),
        (LONG, ("--activation_checkpoint.offload=true", "--activation_checkpoint.mode=full")),
        (LONG, ("--activation_checkpoint.offload=true", "--model.handlers=compile")),
        (
            LONG,
            ("--activation_checkpoint.mode=memory_budget", "--model.handlers=compile"),
        ),
    ],
    ids=lambda value: " ".join(value) if value not in (WIDE, LONG) else "",
)
def test_the_losses_stay_and_memory_is_saved(
    shape: tuple[str, ...], options: tuple[str, ...], tmp_path: Path
) -> None:
    runs.run(tmp_path / "plain", *shape)
    runs.run(tmp_path / "saving", *shape, *options)
    for (_, loss, norm), expected in zip(
        runs.curve(tmp_path / "saving"), runs.curve(tmp_path / "plain"), strict=True
    ):
        assert loss == pytest.approx(expected[1], rel=1e-4)
        assert norm == pytest.approx(expected[2], rel=1e-3)
    assert peak(tmp_path / "saving") < 0.95 * peak(tmp_path / "plain")


@pytest.mark.parametrize("mode", ["disabled", "async", "async_with_pinned_mem"])
def test_a_run_on_the_host_s_memory_resumes(mode: str, tmp_path: Path) -> None:
    options = (
        "--job.device=cuda",
        "--training.enable_cpu_offload=true",
        f"--checkpoint.async_mode={mode}",
        "--lr_scheduler.decay_ratio=0",  # or more steps would change the first ones
    )
    runs.run(tmp_path / "whole", *options)
    runs.run(tmp_path / "parts", *options, "--training.steps=6")
    runs.run(tmp_path / "parts", *options)
    for found, expected in zip(
        runs.curve(tmp_path / "parts"), runs.curve(tmp_path / "whole"), strict=True
    ):
        assert found == pytest.approx(expected, rel=1e-4)
