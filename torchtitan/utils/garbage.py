"""Python's garbage collector, run when all ranks can wait for it.

The collector starts by itself whenever enough objects have been made, which is at another moment on
every rank, and then all others wait in the next collective. So it is off while training, and every
rank runs it after the same steps.
"""

import gc


class GarbageCollection:
    """Collects every `freq` steps, and never in between, while the context is entered."""

    def __init__(self, freq: int):
        assert freq > 0
        self._freq = freq
        self._was_enabled = False

    def __enter__(self) -> "GarbageCollection":
        self._was_enabled = gc.isenabled()
        gc.disable()
        gc.collect()
        # What set-up made lives to the end. Frozen, it is not looked through at every collection.
        gc.freeze()
        return self

    def step(self, step: int) -> None:
        """Call once a step, on every rank."""
        if step % self._freq == 0:
            gc.collect()

    def __exit__(self, *details: object) -> None:
        gc.unfreeze()
        if self._was_enabled:
            gc.enable()
