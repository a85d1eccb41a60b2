"""What the C library's allocator costs a training run on a CPU, and what settings save.

    python scripts/bench_allocator.py [--rounds 5] [--steps 20] [--section.key value ...]

Runs `python -m torchtitan.train` once for each way of setting up glibc's allocator, in turns, and
prints the medians of tokens a second, of the ratio to the untouched allocator within a round, of
CPU seconds and page faults of the whole process, and of its peak memory. CPU seconds and faults
can be trusted on a busy machine, too.
"""

import argparse
import os
import statistics
import sys
import tempfile
from pathlib import Path

from bench_overhead import THREADS, rate_of, run_arguments

NO_MMAP = {"MALLOC_MMAP_MAX_": "0", "MALLOC_TRIM_THRESHOLD_": str(2**62)}
HUGE_PAGES = {"GLIBC_TUNABLES": "glibc.malloc.hugetlb=1"}

# Name -> debug.cpu_allocator and the environment.
VARIANTS: dict[str, tuple[str, dict[str, str]]] = {
    "system": ("system", {}),
    "tuned": ("tuned", {}),
    "environment": ("system", NO_MMAP),
    "huge pages": ("system", HUGE_PAGES),
    "tuned, huge pages": ("tuned", HUGE_PAGES),
    "tuned, torch's huge pages": ("tuned", {"THP_MEM_ALLOC_ENABLE": "1"}),
}


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__.split("\n", 1)[0])
    parser.add_argument("--rounds", type=int, default=5, help="runs of every variant")
    parser.add_argument("--steps", type=int, default=20, help="steps measured after the warmup")
    parser.add_argument("--only", nargs="+", choices=VARIANTS, default=list(VARIANTS))
    options, overrides = parser.parse_known_args()
    arguments = run_arguments(options.steps, overrides)
    results: dict[str, list[dict[str, float]]] = {name: [] for name in options.only}
    for _ in range(options.rounds):
        for name in options.only:
            results[name].append(measure(*VARIANTS[name], arguments))
    print(f"{'':<26} tokens/s  ratio  (from - to)    CPU s  thousand faults  peak MiB")
    for name, runs in results.items():
        print(f"{name:<26} {summary(runs, results[options.only[0]])}", flush=True)


def summary(runs: list[dict[str, float]], base: list[dict[str, float]]) -> str:
    median = {key: statistics.median(run[key] for run in runs) for key in runs[0]}
    ratios = sorted(run["rate"] / other["rate"] for run, other in zip(runs, base))
    return (
        f"{median['rate']:>8,.0f}  {statistics.median(ratios):5.2f}"
        f"  ({ratios[0]:.2f} - {ratios[-1]:.2f})  {median['cpu']:>7.1f}"
        f"  {median['faults'] / 1000:>15,.0f}  {median['peak']:>8,.0f}"
    )


def measure(allocator: str, variables: dict[str, str], arguments: list[str]) -> dict[str, float]:
    """Tokens a second, CPU seconds, page faults and peak MiB of one run."""
    with tempfile.TemporaryDirectory() as folder:
        command = [sys.executable, "-m", "torchtitan.train", *arguments]
        command += ["--debug.cpu_allocator", allocator, "--job.dump_folder", folder]
        environment = {**os.environ, "OMP_NUM_THREADS": str(THREADS), **variables}
        with open(os.path.join(folder, "log"), "wb") as log:
            output = [(os.POSIX_SPAWN_DUP2, log.fileno(), stream) for stream in (1, 2)]
            pid = os.posix_spawn(command[0], command, environment, file_actions=output)
        _, status, usage = os.wait4(pid, 0)
        if status:
            sys.exit(f"{' '.join(command)} failed:\n{Path(folder, 'log').read_text()}")
        return {
            "rate": rate_of(Path(folder)),
            "cpu": usage.ru_utime + usage.ru_stime,
            "faults": usage.ru_minflt,
            "peak": usage.ru_maxrss / 1024,
        }


if __name__ == "__main__":
    main()
