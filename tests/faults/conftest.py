"""The S3 server of the tests that need one; its packages are imported for these only."""

import hashlib
from collections.abc import Iterator
from typing import Any

import pytest

from torchtitan.checkpoint import remote as uploads
from torchtitan.utils import remote


@pytest.fixture(scope="module")
def server() -> Iterator[Any]:
    from tests.s3_server import s3_server

    with s3_server() as server:
        yield server


@pytest.fixture
def url(server: Any, request: pytest.FixtureRequest, monkeypatch: pytest.MonkeyPatch) -> str:
    """A folder of this test alone in the server; clients repeat at once."""
    from tests.s3_server import BUCKET

    server.good_again()
    monkeypatch.setattr(remote, "_FIRST_DELAY_SECONDS", 0.01)
    monkeypatch.setattr(uploads, "_AGAIN_SECONDS", 0.01)
    return f"s3://{BUCKET}/{hashlib.sha1(request.node.name.encode()).hexdigest()[:8]}"
