"""Fixtures of the data tests."""

from pathlib import Path

import pytest
from data_runs import WRITERS, make_documents

from torchtitan.data.registry import DATASETS


@pytest.fixture(params=sorted(WRITERS))
def dataset(request: pytest.FixtureRequest, tmp_path: Path) -> tuple[str, list[str]]:
    """A dataset in each format: what to set as dataset_path, and its documents."""
    documents = make_documents(200)
    return WRITERS[request.param](tmp_path, documents), documents


@pytest.fixture(autouse=True)
def registered_datasets(monkeypatch: pytest.MonkeyPatch) -> None:
    """Forget the datasets that a test registers, when it ends."""
    monkeypatch.setattr(DATASETS, "_registered", dict(DATASETS._registered))
