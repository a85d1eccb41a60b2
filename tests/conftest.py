"""Fixtures of all tests."""

import logging
from collections.abc import Iterator

import pytest

from tests.distributed import own_models
from tests.pool import GlooPool
from torchtitan.models.registry import MODELS


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
