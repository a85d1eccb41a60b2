"""Python's garbage collector, run when all ranks can wait for it.

The collector starts by itself whenever enough objects have been made, which is at another moment on
every rank, and then all others wait in the next collective. So it is off while training, and every
rank runs it after the same steps.

What it is needed for are objects that refer to each other in a circle. A tensor that hangs on such
a circle holds its memory until the next run, thousands of microbatches later perhaps. `debug` finds
them: the collector then runs after every step, and the log says what was kept alive, and by what.
"""

import gc
import logging
from typing import Any

from torchtitan.utils.text import plural, some_of

logger = logging.getLogger(__name__)

_MIB = 2**20
_MAX_HOLDERS = 5


class GarbageCollection:
    """Garbage collection every `freq` steps, and never in between.

    `debug` collects after every step, and warns once of each new kind of circle with tensors on it.
    """

    def __init__(self, freq: int, debug: bool = False):
        assert freq > 0
        self._freq = freq
        self._debug = debug
        self._told: set[str] = set()
        self._was_enabled = False

    def __enter__(self) -> "GarbageCollection":
        self._was_enabled = gc.isenabled()
        gc.disable()
        gc.collect()
        # What set-up made lives to the end. Frozen, it is not looked through at every collection.
        gc.freeze()
        return self

    def step(self, number: int, what: str = "step") -> None:
        """Call on every rank after each step, and after each batch of a validation."""
        if self._debug:
            self._collect_and_report(f"{what} {number}")
        elif number % self._freq == 0:
            gc.collect()

    def _collect_and_report(self, place: str) -> None:
        sizes, holders = _collect_tensors()
        kind = some_of(sorted(holders), _MAX_HOLDERS) or "themselves"
        if sizes and kind not in self._told:
            self._told.add(kind)
            logger.warning(
                "After %s the garbage collector freed %s of %.2f MiB, which were kept"
                " alive by: %s. What refers to itself in a circle frees nothing until it runs.",
                place,
                plural(len(sizes), "tensor"),
                sum(sizes) / _MIB,
                kind,
            )

    def __exit__(self, *details: object) -> None:
        gc.unfreeze()
        if self._was_enabled:
            gc.enable()


def _collect_tensors() -> tuple[list[int], set[str]]:
    """Collect; return the size in bytes of each tensor that was freed, and what held them.

    The garbage is kept for a look before it is freed, so two collections are run.
    """
    import torch

    flags, before = gc.get_debug(), len(gc.garbage)
    gc.set_debug(gc.DEBUG_SAVEALL)
    try:
        gc.collect()
    finally:
        gc.set_debug(flags)
    garbage = gc.garbage[before:]
    del gc.garbage[before:]
    sizes: dict[int, int] = {}
    holders = set()
    for holder in garbage:
        # A tensor that a circle refers to, without leading back to it, is no garbage itself.
        for item in (holder, *gc.get_referents(holder)):
            if isinstance(item, torch.Tensor):
                sizes[id(item)] = item.nbytes
                if item is not holder:
                    holders.add(_describe(holder))
    del garbage
    holder = item = None
    gc.collect()
    return list(sizes.values()), holders


def _describe(holder: Any) -> str:
    """Return the type of an object; a function or a dict by a name that can be found."""
    if isinstance(holder, dict):
        return f"a dict with {', '.join(map(repr, list(holder)[:3]))}"
    name = getattr(holder, "__qualname__", None)
    if isinstance(name, str):
        return f"{type(holder).__name__} {getattr(holder, '__module__', '')}.{name}"
    return f"{type(holder).__module__}.{type(holder).__qualname__}"
