"""Settings of this process that hold for everything in it: threads, determinism."""

import os

import torch

from torchtitan.utils.environment import ProcessEnvironment


def set_up_process(threads: int, environment: ProcessEnvironment, seed: int) -> None:
    """Set the number of CPU threads and the random seed.

    0 threads mean this process's share of the cores. An OMP_NUM_THREADS that a user has set is
    respected; one that torchrun has set (to 1, for safety) cannot be told from it, and is not: with
    two processes on eight cores, four threads each are neither too many nor too few.
    """
    if threads == 0 and (environment.launched or not os.environ.get("OMP_NUM_THREADS")):
        threads = max(1, _num_cores() // environment.local_world_size)
    if threads:
        torch.set_num_threads(threads)
    torch.manual_seed(seed)


def _num_cores() -> int:
    if hasattr(os, "sched_getaffinity"):  # not on macOS
        return len(os.sched_getaffinity(0))
    return os.cpu_count() or 1


def use_deterministic_algorithms(warn_only: bool) -> None:
    """Refuse (or warn of) operators whose result depends on timing."""
    # cuBLAS reads it when it is loaded; its default workspace is not deterministic.
    os.environ.setdefault("CUBLAS_WORKSPACE_CONFIG", ":4096:8")
    torch.use_deterministic_algorithms(True, warn_only=warn_only)
    torch.backends.cudnn.benchmark = False
