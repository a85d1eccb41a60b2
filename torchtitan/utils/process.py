"""Settings of this process that hold for everything in it: threads, determinism."""

import os

import torch


def set_up_process(threads: int, processes_per_machine: int, seed: int) -> None:
    """Set the number of CPU threads (0: this process's share of the cores) and the random seed.

    A launcher that sets OMP_NUM_THREADS to 1 for safety is overruled: with two processes on eight
    cores, four threads each are neither too many nor too few.
    """
    if threads == 0:
        threads = max(1, len(os.sched_getaffinity(0)) // processes_per_machine)
    torch.set_num_threads(threads)
    torch.manual_seed(seed)


def use_deterministic_algorithms(warn_only: bool) -> None:
    """Refuse (or warn of) operators whose result depends on timing."""
    # cuBLAS reads it when it is loaded; its default workspace is not deterministic.
    os.environ.setdefault("CUBLAS_WORKSPACE_CONFIG", ":4096:8")
    torch.use_deterministic_algorithms(True, warn_only=warn_only)
    torch.backends.cudnn.benchmark = False
