"""Describe the device of this process, and set up threads, seed and determinism."""

import os
import re
import sys
from dataclasses import dataclass
from pathlib import Path
from typing import Literal

import torch

from torchtitan.utils.environment import ProcessEnvironment

GIB = 2**30


def device_type(setting: Literal["auto", "cpu", "cuda"]) -> Literal["cpu", "cuda"]:
    """Return the kind of device that `job.device` means on this machine.

    Raises:
        RuntimeError: `cuda` is asked for and this process sees no GPU.
    """
    if setting == "cpu":
        return "cpu"
    if torch.cuda.is_available():
        return "cuda"
    if setting == "cuda":
        raise RuntimeError("job.device is cuda, but this process sees no GPU")
    return "cpu"


def device_name(device: torch.device) -> str:
    """Return the maker's name of the device; `cpu` for the CPU."""
    return torch.cuda.get_device_name(device) if device.type == "cuda" else "cpu"


def synchronize(device: torch.device) -> None:
    """Wait until the device has finished its work. Does nothing on the CPU."""
    if device.type == "cuda":
        torch.cuda.synchronize(device)


@dataclass(frozen=True)
class MemoryPeak:
    """The highest memory use, in GiB; None where a device does not know it.

    `reserved_gib`: on CUDA what the allocator took from the device since `reset_memory_peak`, on
    the CPU the resident memory of this process since it started. `active_gib`: the part of that
    which tensors really used. `capacity_gib`: what the device, or the machine, has.
    """

    reserved_gib: float
    capacity_gib: float
    active_gib: float | None = None
    num_alloc_retries: int | None = None
    num_ooms: int | None = None


def memory_peak(device: torch.device) -> MemoryPeak:
    """Return the memory peak of this process. Does not wait for the device."""
    if device.type == "cuda":
        stats = torch.cuda.memory_stats(device)
        return MemoryPeak(
            reserved_gib=stats.get("reserved_bytes.all.peak", 0) / GIB,
            capacity_gib=torch.cuda.get_device_properties(device).total_memory / GIB,
            active_gib=stats.get("active_bytes.all.peak", 0) / GIB,
            num_alloc_retries=stats.get("num_alloc_retries", 0),
            num_ooms=stats.get("num_ooms", 0),
        )
    return MemoryPeak(
        reserved_gib=_peak_resident_bytes() / GIB,
        capacity_gib=os.sysconf("SC_PAGE_SIZE") * os.sysconf("SC_PHYS_PAGES") / GIB,
    )


def reset_memory_peak(device: torch.device) -> None:
    """Reset the peaks, except on the CPU, where the system keeps one for a process's life."""
    if device.type == "cuda":
        torch.cuda.reset_peak_memory_stats(device)


def _peak_resident_bytes() -> int:
    # Not by getrusage on Linux: there a process inherits the peak of the one that started it.
    status = Path("/proc/self/status")
    if status.exists():
        for line in status.read_text().splitlines():
            if line.startswith("VmHWM:"):
                return int(line.split()[1]) * 1024
    import resource  # not on Windows, where the rest of this module still imports

    peak = resource.getrusage(resource.RUSAGE_SELF).ru_maxrss
    return peak if sys.platform == "darwin" else peak * 1024


def set_up_process(threads: int, environment: ProcessEnvironment, seed: int) -> None:
    """Set the number of CPU threads and the random seed.

    0 threads mean this process's share of the cores. An OMP_NUM_THREADS that a user has set is
    respected; one that torchrun has set (to 1, for safety) cannot be told from it, and is not: with
    two processes on eight cores, four threads each are neither too many nor too few.
    """
    if threads == 0 and (environment.launched or not os.environ.get("OMP_NUM_THREADS")):
        threads = max(1, num_cores() // environment.local_world_size)
    if threads:
        torch.set_num_threads(threads)
    torch.manual_seed(seed)


def num_cores() -> int:
    """Return the cores that this process may use."""
    if hasattr(os, "sched_getaffinity"):  # not on macOS
        return len(os.sched_getaffinity(0))
    return os.cpu_count() or 1


def use_deterministic_algorithms(warn_only: bool) -> None:
    """Reject (or warn of) operators whose result depends on timing."""
    # cuBLAS reads it when it is loaded; its default workspace is not deterministic.
    os.environ.setdefault("CUBLAS_WORKSPACE_CONFIG", ":4096:8")
    torch.use_deterministic_algorithms(True, warn_only=warn_only)
    torch.backends.cudnn.benchmark = False


# The makers' figures for dense (not sparse) bfloat16 matrix products with float32 accumulation. A
# device that is not listed has no figure: an MFU against a guessed peak would be worse than none.

_BF16_PEAK_FLOPS: tuple[tuple[str, float], ...] = (
    # The first pattern that is found in the device's name counts: variants stand before the rule.
    (r"\bA100\b", 312e12),
    (r"\bA800\b", 312e12),
    (r"\bA40\b", 149.7e12),
    (r"\bA30\b", 165e12),
    (r"\bA10\b", 125e12),
    (r"\bL40S\b", 362e12),
    (r"\bL40\b", 181e12),
    (r"\bL4\b", 121e12),
    (r"\bH100 NVL\b", 835e12),
    (r"\bH100 PCIe\b", 756e12),
    (r"\bH100\b", 989e12),
    (r"\bH800\b", 989e12),
    (r"\bH20\b", 148e12),
    (r"\bH200 NVL\b", 835e12),
    (r"\bH200\b", 989e12),
    (r"\bGH200\b", 989e12),
    (r"\bB200\b", 2.25e15),
    (r"\bGB200\b", 2.5e15),
    # GeForce and RTX cards: "Peak BF16 Tensor TFLOPS with FP32 Accumulate", dense, in the tables of
    # NVIDIA's white papers "Ampere GA102 GPU Architecture", "Ada GPU Architecture" and "RTX
    # Blackwell GPU Architecture". GeForce accumulates in float32 at half the rate.
    (r"\bRTX A6000\b", 154.8e12),
    (r"\bRTX 6000 Ada\b", 364.2e12),
    (r"\bRTX 3090 Ti\b", 80e12),
    (r"\bRTX 3090\b", 71e12),
    (r"\bRTX 4070 Ti SUPER\b", 88.2e12),
    (r"\bRTX 4070 Ti\b", 80.2e12),
    (r"\bRTX 4080 SUPER\b", 104.4e12),
    (r"\bRTX 4080\b", 97.5e12),
    (r"\bRTX 4090\b(?! D)", 165.2e12),
    (r"\bRTX 5070 Ti\b", 87.9e12),
    (r"\bRTX 5080\b", 112.6e12),
    (r"\bRTX 5090\b(?! D)", 209.5e12),
    (r"\bMI210\b", 181e12),
    # One of the two dies of a card: each is a device. Some drivers name both models: unknown.
    (r"\bMI250X\b(?!\s*/)", 191.5e12),
    (r"(?<!MI250X/)\bMI250\b", 181e12),
    (r"\bMI300A\b", 980.6e12),
    (r"\bMI300X\b", 1307.4e12),
    (r"\bMI325X\b", 1307.4e12),
    (r"\bMI350X\b", 2.3e15),
    (r"\bMI355X\b", 2.5e15),
)


def peak_flops(device_name: str) -> float | None:
    """Dense bfloat16 FLOP/s of the device at its best; None if it is not known.

    A slice of a GPU (MIG) is not known: its name does not say how large it is in a reliable way.
    Nor is a GPU of a laptop, which runs as fast as its maker lets it.
    """
    if re.search(r"\b(MIG|Laptop|Max-Q)\b", device_name):
        return None
    for pattern, flops in _BF16_PEAK_FLOPS:
        if re.search(pattern, device_name, re.IGNORECASE):
            return flops
    return None
