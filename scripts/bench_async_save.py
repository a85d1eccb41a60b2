"""How much longer steps take while a checkpoint is written beside them, on a CPU.

Steps of a matrix product and an AdamW update are timed without a save and then with one under way,
in turns, with the writing thread at the priority of training (niceness 0) and at its own. The stall
is the time that all steps beside one save took longer than as many steps alone.

    python scripts/bench_async_save.py --megabytes 200 --threads 2
"""

import argparse
import shutil
import statistics
import tempfile
import time
from pathlib import Path

import torch
from torch import nn

from torchtitan.checkpoint import async_save
from torchtitan.checkpoint.state import model_tensors, optimizer_tensors
from torchtitan.checkpoint.store import CheckpointStore
from torchtitan.config.schema import Checkpoint
from torchtitan.distributed.context import open_context
from torchtitan.utils.environment import read_environment

_WIDTH = 1024


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__)
    parser.add_argument("--megabytes", type=int, default=200, help="size of a checkpoint")
    parser.add_argument("--threads", type=int, default=2)
    parser.add_argument("--rounds", type=int, default=3)
    parser.add_argument("--folder", help="where to write; a temporary folder without")
    arguments = parser.parse_args()
    torch.set_num_threads(arguments.threads)
    folder = Path(tempfile.mkdtemp(prefix="bench-save-", dir=arguments.folder))
    try:
        with open_context("cpu", read_environment({}), 60) as world:
            measure(arguments, world, folder)
    finally:
        shutil.rmtree(folder)


def measure(arguments: argparse.Namespace, world: object, folder: Path) -> None:
    layers = max(1, arguments.megabytes * 2**20 // (3 * 4 * _WIDTH * _WIDTH))
    model = nn.Sequential(*(nn.Linear(_WIDTH, _WIDTH, bias=False) for _ in range(layers)))
    optimizer = torch.optim.AdamW(model.parameters(), lr=1e-4, fused=True)
    batch = torch.randn(64, _WIDTH)

    def step() -> float:
        started = time.perf_counter()
        model(batch).square().mean().backward()
        optimizer.step()
        optimizer.zero_grad()
        return time.perf_counter() - started

    section = Checkpoint(enable=True, async_mode="async", keep_latest_k=2)
    store = CheckpointStore(section, folder / "checkpoint", world, {"run_id": "bench"})  # type: ignore[arg-type]
    for _ in range(3):
        step()
    stalls: dict[int, list[float]] = {0: [], async_save._NICENESS: []}
    saves: dict[int, list[float]] = {niceness: [] for niceness in stalls}
    for number in range(1, 2 * arguments.rounds + 1):
        async_save._NICENESS = list(stalls)[number % 2]
        alone = statistics.median(step() for _ in range(15))
        tensors = model_tensors([model]) | optimizer_tensors([model], [optimizer])
        started = time.perf_counter()
        store.save(number, tensors, {})
        copied = time.perf_counter() - started
        seconds = []
        while store.saved_step < number:
            seconds.append(step())
        saves[async_save._NICENESS].append(time.perf_counter() - started)
        store.wait()
        stalls[async_save._NICENESS].append(sum(seconds) - alone * len(seconds))
        print(
            f"niceness {async_save._NICENESS}: copies {copied:.2f} s, beside {len(seconds)} steps"
            f" of {alone:.3f} s alone and {statistics.mean(seconds):.3f} s then (longest"
            f" {max(seconds):.3f} s): stall {stalls[async_save._NICENESS][-1]:.2f} s"
        )
    for niceness, seconds in stalls.items():
        print(
            f"niceness {niceness}, median of {arguments.rounds}: stall"
            f" {statistics.median(seconds):.2f} s of a save of"
            f" {statistics.median(saves[niceness]):.2f} s"
        )


if __name__ == "__main__":
    main()
