"""What the initial weights of a model cost on a CPU, by the number of ranks that share them.

    python scripts/bench_init.py [--flavor 1B] [--ranks 1 8] [--rounds 3] [--threads 1]

Builds a Llama 3 as the first rank of so many (FSDP over all of them) and fills this rank's share,
which needs no other rank. Every measurement is a process of its own. Printed are medians: seconds
on the clock and of CPU time (which a busy machine changes less), and the memory that the process
needed at most beyond the parameters themselves.
"""

import argparse
import json
import os
import statistics
import subprocess
import sys
from pathlib import Path

ROOT = Path(__file__).parents[1]
VOCAB_SIZE = 128256


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__.split("\n", 1)[0])
    parser.add_argument("--flavor", default="1B", help="of llama3")
    parser.add_argument("--ranks", type=int, nargs="+", default=[1, 8])
    parser.add_argument("--rounds", type=int, default=3, help="measurements of every kind")
    parser.add_argument("--threads", type=int, default=1)
    parser.add_argument("--worker", action="store_true", help=argparse.SUPPRESS)
    options = parser.parse_args()
    if options.worker:
        print(json.dumps(measure(options.flavor, options.ranks[0], options.threads)))
        return
    results: dict[int, list[dict[str, float]]] = {ranks: [] for ranks in options.ranks}
    for _ in range(options.rounds):
        for ranks in options.ranks:
            results[ranks].append(run_worker(options.flavor, ranks, options.threads))
    print("ranks  million parameters here  seconds  CPU s  per 100 million  MiB beyond")
    for ranks, runs in results.items():
        median = {key: statistics.median(run[key] for run in runs) for key in runs[0]}
        rate = median["cpu"] / median["parameters"] * 1e8
        print(
            f"{ranks:>5}  {median['parameters'] / 1e6:>23,.1f}  {median['seconds']:>7.1f}"
            f"  {median['cpu']:>5.1f}  {rate:>15.2f}  {median['beyond_mib']:>10.0f}"
        )


def run_worker(flavor: str, ranks: int, threads: int) -> dict[str, float]:
    command = [sys.executable, __file__, "--worker", "--flavor", flavor]
    command += ["--ranks", str(ranks), "--threads", str(threads)]
    environment = {**os.environ, "OMP_NUM_THREADS": str(threads), "PYTHONPATH": str(ROOT)}
    done = subprocess.run(command, capture_output=True, text=True, env=environment)
    if done.returncode:
        sys.exit(f"{' '.join(command)} failed:\n{done.stderr}")
    return json.loads(done.stdout.splitlines()[-1])


def measure(flavor: str, ranks: int, threads: int) -> dict[str, float]:
    """Fill the share of the first of `ranks`, in this process."""
    import resource
    import time

    import torch
    from torch.distributed.tensor import DTensor

    from torchtitan.config import JobConfig
    from torchtitan.distributed.context import fake_world
    from torchtitan.distributed.parallel_dims import ParallelDims
    from torchtitan.parallel.initialize import initialize_parameters
    from torchtitan.training import model_builder

    torch.set_num_threads(threads)
    config = JobConfig.model_validate({"model": {"flavor": flavor}})
    dims = ParallelDims.from_section(config.parallelism, ranks)
    with fake_world(0, ranks):
        mesh = dims.build_mesh("cpu")
        device = torch.device("cpu")
        model = model_builder.build_model(config, VOCAB_SIZE, mesh, dims, device, initialise=False)
        [part] = model.parts
        held = [p.to_local() if isinstance(p, DTensor) else p for p in part.parameters()]
        for tensor in held:
            tensor.data.zero_()  # memory counts once it is touched
        before = resource.getrusage(resource.RUSAGE_SELF).ru_maxrss
        start, cpu_start = time.perf_counter(), time.process_time()
        initialize_parameters(part, part.init_rule, seed=0)  # type: ignore[arg-type]
        seconds, cpu = time.perf_counter() - start, time.process_time() - cpu_start
    return {
        "parameters": sum(tensor.numel() for tensor in held),
        "seconds": seconds,
        "cpu": cpu,
        "beyond_mib": (resource.getrusage(resource.RUSAGE_SELF).ru_maxrss - before) / 1024,
    }


if __name__ == "__main__":
    main()
