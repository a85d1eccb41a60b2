"""What head and loss cost alone, forward and backward, by the number of chunks.

    python scripts/bench_loss.py [--rounds 5] [--chunks 1,8] [--dtype bfloat16] [--device cpu]
        [--positions 4096] [--width 512] [--vocabulary 32000]

The losses are cross entropy, the same with z-loss and label smoothing, and one that derives from
`ChunkedLoss` and leaves its gradient to autograd. Every measurement is a process of its own, of one
thread and with the tuned allocator; they take turns, and medians are printed. On a CPU time is that
of the processor, so that other programs matter less, and memory the highest resident memory of the
process, with what Python and torch take; on CUDA time is by the clock, and memory what tensors take
at most.
"""

import argparse
import json
import resource
import statistics
import subprocess
import sys
import time

PASSES = 3
WARMUP_PASSES = 1
REGULARISED = {"z_loss_weight": 1e-4, "label_smoothing": 0.1}
LOSSES = ("cross entropy", "with z-loss and smoothing", "by autograd")


def main() -> None:
    parser = argparse.ArgumentParser(description=(__doc__ or "").partition("\n")[0])
    parser.add_argument("--rounds", type=int, default=5)
    parser.add_argument("--chunks", default="1,2,4,8,16,32")
    parser.add_argument("--dtype", default="bfloat16", choices=["bfloat16", "float32"])
    parser.add_argument("--device", default="cpu")
    parser.add_argument("--positions", type=int, default=4096)
    parser.add_argument("--width", type=int, default=512)
    parser.add_argument("--vocabulary", type=int, default=32000)
    parser.add_argument("--one", help=argparse.SUPPRESS)
    arguments = parser.parse_args()
    if arguments.one:
        name, _, chunks = arguments.one.rpartition(",")
        print(json.dumps(measure(arguments, name, int(chunks))))
        return
    kinds = [(name, chunks) for name in LOSSES for chunks in arguments.chunks.split(",")]
    found: dict[tuple[str, str], list[tuple[float, float]]] = {kind: [] for kind in kinds}
    for _ in range(arguments.rounds):
        for kind in kinds:
            words = [sys.executable, *sys.argv, f"--one={','.join(kind)}"]
            done = subprocess.run(words, check=True, capture_output=True, text=True)
            found[kind].append(tuple(json.loads(done.stdout)))
            print(*kind, *found[kind][-1], file=sys.stderr)
    print("| loss | chunks | seconds | peak memory, GiB |\n|---|---:|---:|---:|")
    for (name, chunks), values in found.items():
        seconds, gib = (statistics.median(column) for column in zip(*values))
        print(f"| {name} | {chunks} | {seconds:.3f} | {gib:.2f} |")


def measure(arguments: argparse.Namespace, name: str, chunks: int) -> tuple[float, float]:
    """Seconds of a forward and backward, and GiB at most."""
    from torchtitan.utils.host import tune_cpu_allocator

    tune_cpu_allocator()
    import torch
    import torch.nn.functional as F

    from torchtitan.loss.chunked import ChunkedLoss
    from torchtitan.loss.cross_entropy import CrossEntropyLoss
    from torchtitan.loss.registry import CrossEntropySettings
    from torchtitan.models.batch import Batch
    from torchtitan.models.decoder.model import Head

    class ByAutograd(ChunkedLoss):
        def token_losses(self, logits: torch.Tensor, labels: torch.Tensor) -> torch.Tensor:
            return F.cross_entropy(logits, labels, reduction="none")

    torch.set_num_threads(1)
    settings = CrossEntropySettings(**(REGULARISED if name == LOSSES[1] else {}))
    loss = (ByAutograd if name == LOSSES[2] else CrossEntropyLoss)(settings, chunks)
    dtype, device = getattr(torch, arguments.dtype), torch.device(arguments.device)
    shape = 1, arguments.positions
    hidden = torch.randn(*shape, arguments.width, device=device, dtype=dtype, requires_grad=True)
    head = Head(arguments.width, arguments.vocabulary, bias=False, device=device, dtype=dtype)
    batch = Batch(labels=torch.randint(arguments.vocabulary, shape, device=device))
    on_cuda = device.type == "cuda"
    for index in range(WARMUP_PASSES + PASSES):
        if index == WARMUP_PASSES:
            if on_cuda:
                torch.cuda.synchronize()
            start, start_cpu = time.perf_counter(), time.process_time()
        (loss.sum(hidden, head, batch) / arguments.positions).backward()
        hidden.grad = head.weight.grad = None
    if on_cuda:
        torch.cuda.synchronize()
        seconds = time.perf_counter() - start
        return seconds / PASSES, torch.cuda.max_memory_allocated() / 2**30
    seconds = time.process_time() - start_cpu
    return seconds / PASSES, resource.getrusage(resource.RUSAGE_SELF).ru_maxrss / 2**20


if __name__ == "__main__":
    main()
