"""How long this process has been running. No torch."""

import os
import time
from pathlib import Path

_IMPORTED = time.perf_counter()


def seconds_since_start() -> float:
    """Seconds since this process began: importing torch is a large part of a short run.

    Where the system does not tell (it is Linux that does), since this module was imported.
    """
    since_import = time.perf_counter() - _IMPORTED
    try:
        # Field 22, counted behind the program's name, which may hold anything in its parentheses.
        fields = Path("/proc/self/stat").read_text().rpartition(")")[2].split()
        started = int(fields[19]) / os.sysconf("SC_CLK_TCK")
        return max(since_import, time.clock_gettime(time.CLOCK_BOOTTIME) - started)
    except (OSError, ValueError, IndexError, AttributeError):
        return since_import
