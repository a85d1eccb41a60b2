"""Fixtures of all tests, and how they are spread over the processes of pytest-xdist."""

import logging
import signal
from collections.abc import Iterator

import pytest

from tests.distributed import own_models
from tests.forked import keep_preloaded
from tests.pool import GlooPool
from torchtitan.models.registry import MODELS

keep_preloaded()

# A shell's `nohup` and `&` leave these ignored, and what tests start would inherit that.
signal.signal(signal.SIGHUP, signal.SIG_DFL)
signal.signal(signal.SIGINT, signal.default_int_handler)

PARTS = {
    "tests/parity/test_table.py": 8,
    "tests/distributed/test_runs.py": 1,
    "tests/distributed/test_ring_attention.py": 1,
    "tests/distributed/test_handlers_on_meshes.py": 1,
    "tests/meta/test_dry_runs.py": 8,
    "tests/parity/test_checkpoints_move.py": 1,
    "tests/unit/data/test_data_order.py": 1,
    "tests/unit/data/test_sources_order.py": 1,
    "tests/meta/test_scripts.py": 2,
    "tests/parity/test_the_table_catches.py": 1,
    "tests/unit/metrics/test_wandb_sink.py": 1,
    "tests/unit/data/test_worker_processes.py": 1,
    "tests/meta/test_linters.py": 4,
}
"""The files that take longest, these first, and into how many parts each is cut."""


@pytest.hookimpl(tryfirst=True)
def pytest_collection_modifyitems(config: pytest.Config, items: list[pytest.Item]) -> None:
    """Give each file, or part of a long one, to one process: its fixtures are made once."""
    if not hasattr(config, "workerinput"):
        return
    groups: dict[str, list[pytest.Item]] = {}
    for item in items:
        groups.setdefault(item.nodeid.partition("::")[0], []).append(item)
    order = {name: place for place, name in enumerate(PARTS)}
    items.clear()
    for name in sorted(groups, key=lambda name: order.get(name, len(order))):
        size = -(-len(groups[name]) // PARTS.get(name, 1))
        for number, item in enumerate(groups[name]):
            item.add_marker(pytest.mark.xdist_group(f"{name}-{number // size}"))
        items += groups[name]


@pytest.fixture(autouse=True)
def own_families_are_unknown() -> None:
    """What lists all families does not find those that other tests have registered."""
    for family in own_models.FAMILIES:
        MODELS._registered.pop(family.name, None)


@pytest.fixture(autouse=True)
def logging_as_it_was() -> Iterator[None]:
    """A rank that shows its messages does more, so no test leaves the level to the next ones."""
    logger = logging.getLogger("torchtitan")
    level, handlers = logger.level, list(logger.handlers)
    yield
    logger.setLevel(level)
    logger.handlers[:] = handlers


@pytest.fixture(scope="session")
def gloo_pool() -> Iterator[GlooPool]:
    """Processes joined by gloo; see `GlooPool.run`."""
    pool = GlooPool()
    yield pool
    pool.close()
