"""What differs between devices: which there is, its memory, waiting for it."""

import os
import sys
from dataclasses import dataclass
from pathlib import Path
from typing import Literal

import torch

GIB = 2**30


def device_type(setting: Literal["auto", "cpu", "cuda"]) -> Literal["cpu", "cuda"]:
    """The kind of device that `job.device` means on this machine.

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
    """The maker's name of the device; `cpu` for the CPU."""
    return torch.cuda.get_device_name(device) if device.type == "cuda" else "cpu"


def synchronize(device: torch.device) -> None:
    """Wait until the device has done all that it was given. Does nothing on the CPU."""
    if device.type == "cuda":
        torch.cuda.synchronize(device)


@dataclass(frozen=True)
class MemoryPeak:
    """Highest memory use, in GiB. What a device does not know is None.

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
    """The memory peak of this process. Does not wait for the device."""
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
    """Start the peaks anew, except on the CPU: the system keeps one for a process's life."""
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
