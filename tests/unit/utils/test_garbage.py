"""Python's collector runs at the agreed steps and at no other time."""

import gc
import weakref

from torchtitan.utils.garbage import GarbageCollection


class Node:
    """Refers to itself, so that only the collector can free it."""

    def __init__(self) -> None:
        self.own = self


def test_cycles_are_freed_at_every_freq_th_step_only() -> None:
    assert gc.isenabled()
    with GarbageCollection(freq=3) as collection:
        assert not gc.isenabled()
        for first in (1, 4):
            node = weakref.ref(Node())
            for step in (first, first + 1):
                collection.step(step)
                [Node() for _ in range(2000)]  # enough to start the collector, were it on
                assert node() is not None
            collection.step(first + 2)
            assert node() is None
    assert gc.isenabled() and gc.get_freeze_count() == 0


def test_old_cycles_are_freed_too() -> None:
    """What has survived a collection is looked through again at the next one."""
    with GarbageCollection(freq=1) as collection:
        node = Node()
        alive = weakref.ref(node)
        collection.step(1)
        collection.step(2)
        del node
        collection.step(3)
        assert alive() is None


def test_a_collector_that_was_off_stays_off() -> None:
    gc.disable()
    try:
        with GarbageCollection(freq=1):
            pass
        assert not gc.isenabled()
    finally:
        gc.enable()
