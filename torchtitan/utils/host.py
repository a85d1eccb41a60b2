"""Set up the CPU host of this process: allocator, waiting threads, free memory. No torch.

By default glibc takes every large block from the kernel by mmap, gives it back when it is freed,
and trims the heap when its end is free. A training step allocates and frees the same large tensors
again and again, so the kernel zeroes the same pages in every step: a quarter to a half of the time
on small models. With the settings below the allocator keeps what it has and reaches a steady state
without page faults; memory once used stays with the process until it ends.
"""

import ctypes
import os
import sys
import time
from pathlib import Path

_IMPORTED = time.perf_counter()
_COMPUTED_BEFORE = time.process_time()

# <malloc.h>
_M_TRIM_THRESHOLD = -1
_M_MMAP_MAX = -4

# mallopt takes an int, which glibc widens to an unsigned size: -1 becomes the largest size there
# is, while INT_MAX would trim at 2 GiB. And no mmap at all instead of a higher threshold for it,
# whose documented limit, 32 MiB, is less than the largest tensors have.
_SETTINGS = ((_M_MMAP_MAX, 0), (_M_TRIM_THRESHOLD, -1))


def tune_cpu_allocator() -> bool:
    """Make glibc keep freed memory instead of returning it to the kernel.

    Acts on this process at once, and on nothing that it starts. Call it before the first large
    allocation: what was taken by mmap before is still given back. Returns whether the allocator
    took the settings; False with another C library (musl, macOS), which is left alone, and harmless
    with a preloaded one (jemalloc, tcmalloc).
    """
    if not sys.platform.startswith("linux"):
        return False
    try:
        mallopt = ctypes.CDLL(None).mallopt
    except (OSError, AttributeError):
        return False
    mallopt.argtypes = (ctypes.c_int, ctypes.c_int)
    mallopt.restype = ctypes.c_int
    return all(mallopt(name, value) == 1 for name, value in _SETTINGS)


def prepare_host() -> None:
    """Set up the allocator and waiting threads. To be called before torch is imported."""
    spin_briefly()
    tune_cpu_allocator()


_SPIN_COUNT = "10000"


def spin_briefly() -> None:
    """Let waiting threads of OpenMP spin for a short while only, then sleep.

    By default they spin for milliseconds. On a machine that does nothing else it makes no
    difference; where another program wants the cores, threads that wait for one that was put aside
    keep it aside. What the environment says already is left alone. To be called before torch is
    imported.
    """
    if not {"GOMP_SPINCOUNT", "OMP_WAIT_POLICY"} & os.environ.keys():
        os.environ["GOMP_SPINCOUNT"] = _SPIN_COUNT


_CGROUP = Path("/sys/fs/cgroup")


def available_bytes(meminfo: Path = Path("/proc/meminfo"), cgroup: Path = _CGROUP) -> int | None:
    """Return the bytes that programs can still take, within a container's limit, or None."""
    amounts = []
    try:
        lines = dict(line.split(":", 1) for line in meminfo.read_text().splitlines())
        amounts.append(int(lines["MemAvailable"].split()[0]) * 1024)
    except (OSError, ValueError, KeyError, IndexError):
        pass
    try:
        limit = int((cgroup / "memory.max").read_text())
        amounts.append(limit - int((cgroup / "memory.current").read_text()) + _reclaimable(cgroup))
    except (OSError, ValueError):  # no container, or no limit ("max")
        pass
    return max(0, min(amounts)) if amounts else None


def _reclaimable(cgroup: Path) -> int:
    """Return the bytes of cached files that the container would give up."""
    for line in (cgroup / "memory.stat").read_text().splitlines():
        name, _, amount = line.partition(" ")
        if name == "inactive_file":
            return int(amount)
    return 0


def restart_clock() -> None:
    """Let `seconds_since_start` count from now, for a run in a process that has done other work."""
    global _IMPORTED, _COMPUTED_BEFORE
    _IMPORTED, _COMPUTED_BEFORE = time.perf_counter(), 0.0


def seconds_since_start() -> float:
    """Return the seconds since Python started here: importing torch is a large part of a short run.

    What came before this module counts by its processor time, not by the age of the process: a
    script may install for minutes, which is no part of the run, and then become this process.
    """
    return time.perf_counter() - _IMPORTED + _COMPUTED_BEFORE
