"""Fixtures of the data tests."""

from pathlib import Path

import pytest
from data_runs import WRITERS, make_documents


@pytest.fixture(params=sorted(WRITERS))
def dataset(request: pytest.FixtureRequest, tmp_path: Path) -> tuple[str, list[str]]:
    """A dataset in each format: what to set as dataset_path, and its documents."""
    documents = make_documents(200)
    return WRITERS[request.param](tmp_path, documents), documents
