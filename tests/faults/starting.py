"""One start of a run under test: its config, its meshes, its ranks."""

import os
import signal
import time
from collections.abc import Sequence
from multiprocessing.connection import wait
from pathlib import Path
from typing import Any

from tests.forked import CONTEXT, launcher_variables, serve

ROOT = Path(__file__).parents[2]
KEPT = 2
CONFIG = f"""
[model.args]
n_layers = 2
dim = 32
n_heads = 4

[training]
dataset = "stdlib"
local_batch_size = 2
global_batch_size = 8
seq_len = 32
steps = STEPS
dtype = "DTYPE"
mixed_precision_param = "DTYPE"
mixed_precision_reduce = "DTYPE"

[data]
ledger = true

[lr_scheduler]
warmup_steps = 2

[checkpoint]
enable = true
interval = 1
keep_latest_k = {KEPT}

[metrics]
log_freq = 1
"""
_TWO = "--parallelism.{}_parallel_degree=2"
MESHES: dict[str, tuple[int, Sequence[str]]] = {
    "dp 2": (2, ()),
    "tp 2": (2, (_TWO.format("tensor"),)),
    "pp 2": (2, (_TWO.format("pipeline"),)),
    "cp 2": (2, (_TWO.format("context"),)),
    "dp 1": (1, ()),
}


class Start:
    """The ranks of one start of `run`, a `Soaked`."""

    def __init__(self, run: Any, mesh: str, arguments: Sequence[str], fault: str = ""):
        count, of_mesh = MESHES[mesh]
        self._output = run.folder.parent / f"output-{run.starts}"
        self._steps = run.notes / f"steps.{run.starts}"
        words = ["-m", "torchtitan.train", f"--job.config_file={run.config}"]
        words += [f"--job.dump_folder={run.folder}", "--job.custom_import=tests.faults.probe"]
        words += [*of_mesh, *arguments]
        env = {k: v for k, v in os.environ.items() if k not in ("RANK", "WORLD_SIZE")}
        env |= {"PROBE_NOTES": str(run.notes), "PROBE_START": str(run.starts)}
        env |= {"PROBE_FAULT": fault, "PYTHONPATH": str(ROOT), "OMP_NUM_THREADS": "1"}
        self.ranks: list[Any] = [
            CONTEXT.Process(target=serve, args=(words, env | place, "", [str(self._output)] * 2))
            for place in (launcher_variables(count) if count > 1 else [{}])
        ]
        for rank in self.ranks:
            rank.start()

    @property
    def steps(self) -> int:
        """The steps that it has come to."""
        return int(self._steps.read_text() or 0) if self._steps.exists() else 0

    @property
    def codes(self) -> list[int | None]:
        return [rank.exitcode for rank in self.ranks]

    @property
    def living(self) -> list[Any]:
        return [rank for rank in self.ranks if rank.exitcode is None]

    def send(self, number: int, ranks: Sequence[Any]) -> None:
        for rank in ranks:
            if rank.exitcode is None:
                os.kill(rank.pid, number)

    def ends(self, seconds: float, how_many: int) -> bool:
        """Return whether so many ranks have ended after at most so many seconds."""
        deadline = time.monotonic() + seconds
        while len(self.ranks) - len(living := self.living) < how_many:
            left = deadline - time.monotonic()
            if left <= 0 or not wait([rank.sentinel for rank in living], timeout=left):
                return False
            for rank in living:
                rank.join(0.01)
        return True

    def text(self) -> str:
        return self._output.read_text(errors="replace") if self._output.exists() else ""

    def close(self) -> list[int]:
        """Kill what still runs, and return the exit statuses."""
        self.send(signal.SIGKILL, self.ranks)
        for rank in self.ranks:
            rank.join()
        return [rank.exitcode for rank in self.ranks]
