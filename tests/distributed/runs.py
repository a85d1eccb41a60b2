"""Real runs of the program, in processes of their own; most are forked, see `tests/forked.py`."""

import json
import os
import signal
import subprocess
import sys
from collections.abc import Sequence
from pathlib import Path
from typing import Any

from tests.forked import ForkedRun, execute, launcher_variables

ROOT = Path(__file__).parents[2]
CONFIG = """
[model.args]
n_layers = 2
dim = 32
n_heads = 4

[training]
dataset = "stdlib"
local_batch_size = 2
global_batch_size = 8
seq_len = 32
steps = 10
mixed_precision_param = "float32"

[lr_scheduler]
warmup_steps = 2

[checkpoint]
enable = true
interval = 4

[metrics]
log_freq = 1
"""


def command(folder: Path, *arguments: str, processes: int = 1) -> list[str]:
    """The command line of a run in `folder`."""
    config = folder.parent / "config.toml"
    config.write_text(CONFIG)
    launcher = [sys.executable]
    if processes > 1:
        launcher += ["-m", "torch.distributed.run", f"--nproc_per_node={processes}"]
        launcher += ["--rdzv-backend=c10d", "--rdzv-endpoint=localhost:0"]
    return [
        *launcher,
        "-m",
        "torchtitan.train",
        f"--job.config_file={config}",
        f"--job.dump_folder={folder}",
        *arguments,
    ]


_KILLED = """
import os, signal, sys
from torchtitan.utils.garbage import GarbageCollection

last_step, end_step = int(sys.argv.pop(1)), GarbageCollection.step


def end_step_or_die(self, step):
    if step == last_step:
        os.kill(os.getpid(), signal.SIGKILL)
    end_step(self, step)


GarbageCollection.step = end_step_or_die
from torchtitan.cli import main

sys.exit(main(["train", *sys.argv[1:]]))
"""


def killed_after(step: int, words: list[str]) -> list[str]:
    """The command line `words` of a process, which is killed at the end of a step: when that is
    logged, and its save is over or goes on beside training."""
    at = words.index("-m")
    assert words[at + 1] == "torchtitan.train"
    return [*words[:at], "-c", _KILLED, str(step), *words[at + 2 :]]


def environment() -> dict[str, str]:
    """Without whatever launcher started the tests."""
    launcher = (
        "RANK",
        "LOCAL_RANK",
        "WORLD_SIZE",
        "LOCAL_WORLD_SIZE",
        "MASTER_ADDR",
        "MASTER_PORT",
    )
    kept = {name: value for name, value in os.environ.items() if name not in launcher}
    path = os.pathsep.join([str(ROOT), kept.get("PYTHONPATH", "")]).strip(os.pathsep)
    return {**kept, "OMP_NUM_THREADS": "1", "PYTHONPATH": path}


def start_ranks(
    folder: Path, *arguments: str, folders: Sequence[Path], killed_rank: int | None = None
) -> list[ForkedRun]:
    """Start one process in each of `folders`, without a launcher that would look after them. One
    may be killed after step 6."""
    processes = []
    variables = launcher_variables(len(folders))
    for rank, (launcher, working_folder) in enumerate(zip(variables, folders, strict=True)):
        words = command(folder, *arguments)
        words = killed_after(6, words) if rank == killed_rank else words
        processes.append(ForkedRun(words, environment() | launcher, working_folder))
    return processes


def run(
    folder: Path, *arguments: str, processes: int = 1, expect: int = 0
) -> subprocess.CompletedProcess[str]:
    """Run to the end; the exit status must be `expect`."""
    done = execute(command(folder, *arguments, processes=processes), env=environment())
    assert done.returncode == expect, done.stdout + done.stderr
    return done


def run_killed(folder: Path, *arguments: str) -> None:
    """Run until the process is killed after step 6."""
    done = execute(killed_after(6, command(folder, *arguments)), env=environment())
    assert done.returncode == -signal.SIGKILL, done.stdout + done.stderr
    assert len(records(folder)) == 6


def records(folder: Path) -> list[dict[str, Any]]:
    """What the run logged."""
    return [json.loads(line) for line in (folder / "metrics.jsonl").read_text().splitlines()]


def curve(folder: Path) -> list[tuple[int, float, float]]:
    """Step, loss and gradient norm of every logged step."""
    return [(row["step"], row["loss"], row["grad_norm"]) for row in records(folder)]


def status(folder: Path) -> dict[str, Any]:
    """`run_status.json`."""
    return json.loads((folder / "run_status.json").read_text())
