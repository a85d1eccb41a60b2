"""Fixtures of all tests."""

from collections.abc import Iterator

import pytest

from tests.pool import GlooPool


@pytest.fixture(scope="session")
def gloo_pool() -> Iterator[GlooPool]:
    """Processes joined by gloo; see `GlooPool.run`."""
    pool = GlooPool()
    yield pool
    pool.close()
