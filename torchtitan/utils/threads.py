"""How long the threads of CPU operators wait for each other before they let go of the core."""

import os

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
