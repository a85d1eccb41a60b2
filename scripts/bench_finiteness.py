"""How long it takes to find out whether what a checkpoint saves is finite.

    python scripts/bench_finiteness.py [--millions 50] [--layers 24] [--rounds 5]

AdamW's tensors of a model of so many million parameters, on the GPU if there is one: the check, the
copy to host memory that a save beside training begins with, and a save (on a CPU), each by its
fastest round. `isfinite` is the obvious way, for comparison.
"""

import argparse
import tempfile
import time
from collections.abc import Callable
from pathlib import Path

import torch
from torch import Tensor

from torchtitan.checkpoint.async_save import Staging
from torchtitan.checkpoint.store import CheckpointStore
from torchtitan.config.schema import Checkpoint
from torchtitan.distributed.context import open_context
from torchtitan.distributed.finiteness import non_finite_on_any_rank
from torchtitan.utils.environment import read_environment


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__.split("\n", 1)[0])
    parser.add_argument("--millions", type=float, default=50, help="parameters, in millions")
    parser.add_argument("--layers", type=int, default=24, help="with 9 tensors each, as Llama's")
    parser.add_argument("--rounds", type=int, default=5)
    options = parser.parse_args()
    device = "cuda" if torch.cuda.is_available() else "cpu"
    tensors = made_up(int(options.millions * 1e6), options.layers, device)
    gib = sum(tensor.numel() * tensor.element_size() for tensor in tensors.values()) / 2**30
    print(f"{device}, {torch.get_num_threads()} threads: {len(tensors)} tensors, {gib:.2f} GiB")
    with open_context(device, read_environment(), 60) as world:
        report("check", options.rounds, lambda: non_finite_on_any_rank(world, tensors), gib)
        report("isfinite", options.rounds, lambda: by_isfinite(tensors), gib)
        staging = Staging(pinned=device == "cuda")

        def copy() -> None:
            staging.start(tensors)
            staging.finish()

        report("copy", options.rounds, copy, gib)
        if device == "cpu":
            report("save", 1, lambda: save(world, tensors), gib)


def made_up(num_parameters: int, layers: int, device: str) -> dict[str, Tensor]:
    """Weights and both moments, in float32."""
    each = num_parameters // (layers * 9)
    names = [f"{layer}.{kind}" for layer in range(layers) for kind in range(9)]
    kinds = ("weight", "exp_avg", "exp_avg_sq")
    return {f"{name}.{kind}": torch.randn(each, device=device) for name in names for kind in kinds}


def by_isfinite(tensors: dict[str, Tensor]) -> bool:
    """A mask of every tensor, reduced."""
    flags = [tensor.isfinite().all() for tensor in tensors.values()]
    return bool(torch.stack(flags).all())


def save(world: object, tensors: dict[str, Tensor]) -> None:
    """Commit the tensors as a step in a temporary folder."""
    with tempfile.TemporaryDirectory() as folder:
        store = CheckpointStore(Checkpoint(enable=True), Path(folder), world, {"run_id": "x"})
        store.save(1, tensors, {}, blocking=True)


def report(name: str, rounds: int, action: Callable[[], object], gib: float) -> None:
    """Print the fastest of some rounds after one to warm up."""
    if rounds > 1:
        action()
    seconds = []
    for _ in range(rounds):
        started = time.perf_counter()
        action()
        if torch.cuda.is_available():
            torch.cuda.synchronize()
        seconds.append(time.perf_counter() - started)
    print(
        f"{name:<10} {min(seconds) * 1000:>9.1f} ms  {gib / min(seconds):>8.1f} GiB/s", flush=True
    )


if __name__ == "__main__":
    main()
