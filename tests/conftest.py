"""Fixtures of all tests, and how they are spread over the processes of pytest-xdist."""

import logging
import signal
import zlib
from collections.abc import Iterator
from multiprocessing import forkserver
from typing import Any

import pytest

from tests.distributed import own_models
from tests.forked import keep_preloaded
from tests.pool import GlooPool
from tests.smollm2 import smollm2  # noqa: F401  (a fixture)
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


def pytest_configure(config: pytest.Config) -> None:
    """Start importing torch in the fork server while the tests are collected."""
    if hasattr(config, "workerinput"):
        forkserver.ensure_running()


def pytest_collection_modifyitems(config: pytest.Config, items: list[pytest.Item]) -> None:
    """Start with the longest files, or one of them is all that runs at the end."""
    if hasattr(config, "workerinput"):
        order = {name: place for place, name in enumerate(PARTS)}
        items.sort(key=lambda item: order.get(item.nodeid.partition("::")[0], len(order)))


@pytest.hookimpl(optionalhook=True)
def pytest_xdist_make_scheduler(config: pytest.Config, log: Any) -> Any:
    """Give each file, or part of one, to one process, so that its fixtures are made once."""
    from xdist.scheduler import LoadScopeScheduling

    class ByPart(LoadScopeScheduling):
        def _split_scope(self, nodeid: str) -> str:
            name = nodeid.partition("::")[0]
            return f"{name} {zlib.crc32(nodeid.encode()) % PARTS.get(name, 1)}"

    return ByPart(config, log)


@pytest.fixture(autouse=True)
def own_families_are_unknown() -> None:
    """Forget the families of other tests: some tests list all that are registered."""
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
