"""Fixtures of all tests."""

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


@pytest.fixture(scope="session")
def gloo_pool() -> Iterator[GlooPool]:
    """Processes joined by gloo; see `GlooPool.run`."""
    pool = GlooPool()
    yield pool
    pool.close()
