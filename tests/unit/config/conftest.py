"""Fixtures of the config tests."""

from collections.abc import Callable
from pathlib import Path
from typing import Any

import pytest
from old_keys import write

from torchtitan.config.load import LoadedConfig, load_config


@pytest.fixture
def toml(tmp_path: Path) -> Callable[[str, str], str]:
    """Writes a TOML of a name below the test's folder, and returns its path."""

    def write(name: str, text: str) -> str:
        path = tmp_path / name
        path.parent.mkdir(parents=True, exist_ok=True)
        path.write_text(text)
        return str(path)

    return write


@pytest.fixture
def chain(toml: Callable[[str, str], str]) -> Callable[..., LoadedConfig]:
    """Loads the last of `0.toml`, `1.toml` ..., of which each is the base of the next one."""

    def load(*texts: str, flags: tuple[str, ...] = ()) -> LoadedConfig:
        path = ""
        for index, text in enumerate(texts):
            base = f'base = "{index - 1}.toml"\n' if index else ""
            path = toml(f"{index}.toml", base + text)
        return load_config([path, *flags])

    return load


@pytest.fixture
def load(tmp_path: Path) -> Callable[..., LoadedConfig]:
    """Loads a TOML of dotted keys, and flags."""

    def load(keys: dict[str, Any], *flags: str) -> LoadedConfig:
        return load_config([str(write(tmp_path, keys)), *flags])

    return load
