"""Fixtures of the config tests."""

from collections.abc import Callable
from pathlib import Path
from typing import Any

import pytest
from old_keys import write

from torchtitan.config.load import LoadedConfig, load_config


@pytest.fixture
def load(tmp_path: Path) -> Callable[..., LoadedConfig]:
    """Loads a TOML of dotted keys, and flags."""

    def load(keys: dict[str, Any], *flags: str) -> LoadedConfig:
        return load_config([str(write(tmp_path, keys)), *flags])

    return load
