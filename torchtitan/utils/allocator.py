"""glibc's allocator, set up for training on a CPU. No torch.

By default glibc takes every large block from the kernel by mmap, gives it back when it is freed,
and trims the heap when its end is free. A training step allocates and frees the same large tensors
again and again, so the kernel zeroes the same pages in every step: a quarter to a half of the time
on small models. Told to keep what it has, the allocator reaches a steady state in which a step
causes no page fault, at the price that memory once used stays with the process until it ends.
"""

import ctypes
import sys

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
