"""Python's collector runs at the agreed steps and at no other time."""

import gc
import logging
import weakref

import pytest
import torch

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


def test_batches_of_a_validation_count_by_themselves() -> None:
    with GarbageCollection(freq=2) as collection:
        node = weakref.ref(Node())
        collection.step(1, "validation batch")
        assert node() is not None
        collection.step(2, "validation batch")
        assert node() is None


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


def circle_with(tensor: torch.Tensor) -> weakref.ref[Node]:
    node = Node()
    node.activations = tensor  # type: ignore[attr-defined]
    return weakref.ref(node)


def warnings_of(caplog: pytest.LogCaptureFixture) -> list[str]:
    return [record.getMessage() for record in caplog.records if record.levelname == "WARNING"]


def test_debug_names_what_keeps_tensors_alive(caplog: pytest.LogCaptureFixture) -> None:
    with GarbageCollection(freq=1000, debug=True) as collection:
        torch.zeros(2**18)  # freed at once: no circle
        collection.step(1)
        assert warnings_of(caplog) == []
        node = circle_with(torch.zeros(2**18))
        assert node() is not None
        collection.step(2)
        assert node() is None, "debugging must free what the collector would free"
        [warning] = warnings_of(caplog)
        assert "After step 2 " in warning and "freed 1 tensor of 1.00 MiB" in warning
        assert "Node" in warning or "activations" in warning
        circle_with(torch.zeros(2**18))
        collection.step(3)
        assert len(warnings_of(caplog)) == 1, "the same kind once"
        circle: list[object] = [torch.zeros(8)]
        circle.append(circle)
        del circle
        collection.step(5, "validation batch")
        assert "After validation batch 5 " in warnings_of(caplog)[1]
    assert gc.garbage == [] and gc.get_debug() == 0 and gc.isenabled()


def test_debug_finds_tensors_in_closures(caplog: pytest.LogCaptureFixture) -> None:
    def leak() -> None:
        tensor = torch.zeros(2**20)

        def again() -> int:
            return again() if tensor is None else tensor.numel()

        again()

    with GarbageCollection(freq=1000, debug=True) as collection:
        leak()
        collection.step(1)
    [warning] = warnings_of(caplog)
    assert "4.00 MiB" in warning


def test_debug_frees_what_was_put_into_gc_garbage_before(caplog: pytest.LogCaptureFixture) -> None:
    """And leaves the objects of others there."""
    caplog.set_level(logging.WARNING)
    mine = object()
    gc.garbage.append(mine)
    try:
        with GarbageCollection(freq=1, debug=True) as collection:
            circle_with(torch.zeros(4))
            collection.step(1)
        assert gc.garbage == [mine]
    finally:
        gc.garbage.clear()
