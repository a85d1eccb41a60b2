"""How long this process has been running. No torch. The command line imports it first."""

import time

_IMPORTED = time.perf_counter()
_COMPUTED_BEFORE = time.process_time()


def seconds_since_start() -> float:
    """Return the seconds since Python started here: importing torch is a large part of a short run.

    What came before this module counts by its processor time, not by the age of the process: a
    script may install for minutes, which is no part of the run, and then become this process.
    """
    return time.perf_counter() - _IMPORTED + _COMPUTED_BEFORE
