"""Datasets by name. Importing this module imports neither torch nor numpy."""

import os
import sysconfig
from collections.abc import Callable
from dataclasses import dataclass
from typing import TYPE_CHECKING

from torchtitan.config import ConfigError, Problem
from torchtitan.config.training_sections import Data, Training

if TYPE_CHECKING:
    from torchtitan.data.sources import Source

Factory = Callable[[Training, Data], "Source"]


@dataclass(frozen=True)
class DatasetEntry:
    name: str
    factory: Factory
    description: str
    """One line for `torchtitan list datasets`."""
    needs_path: bool = False
    """Whether `training.dataset_path` must be set; otherwise it is refused."""


_DATASETS: dict[str, DatasetEntry] = {}


def register_dataset(
    name: str, factory: Factory, description: str = "", needs_path: bool = False
) -> None:
    """Make `training.dataset = name` known; `factory(training, data)` builds its Source.

    The factory raises ConfigError for what the user can mend. Raises ValueError for a taken name.
    """
    if name in _DATASETS:
        raise ValueError(f"a dataset named {name!r} is registered already")
    _DATASETS[name] = DatasetEntry(name, factory, description, needs_path)


def datasets() -> dict[str, DatasetEntry]:
    """All registered datasets by name."""
    return dict(_DATASETS)


def build_source(training: Training, data: Data) -> "Source":
    """The dataset that the config names. Raises ConfigError."""
    entry = _DATASETS.get(training.dataset)
    if entry is None:
        names = ", ".join(sorted(_DATASETS))
        raise ConfigError(
            Problem(
                "training.dataset",
                "there is no such dataset",
                f"use one of {names}",
                value=training.dataset,
            )
        )
    return entry.factory(training, data)


def _max_document_bytes(data: Data) -> int:
    return max(1, int(data.max_document_mib * 2**20))


def _from_files(training: Training, data: Data) -> "Source":
    from torchtitan.data.files import find_files
    from torchtitan.data.sources import JsonSource, TextSource
    from torchtitan.data.token_files import is_token_folder

    if training.dataset_path is None:
        raise ConfigError(missing_path(training.dataset))
    if training.dataset == "auto" and is_token_folder(training.dataset_path):
        return _tokens(training, data)
    wanted = training.dataset
    assert wanted in ("auto", "json", "text")
    kind, files = find_files(training.dataset_path, wanted)  # type: ignore[arg-type]
    if kind == "text":
        return TextSource(files, _max_document_bytes(data))
    return JsonSource(files, _max_document_bytes(data), data.text_column)


def _tokens(training: Training, data: Data) -> "Source":
    from torchtitan.data.token_source import TokenSource

    if training.dataset_path is None:
        raise ConfigError(missing_path(training.dataset))
    return TokenSource(training.dataset_path)


def missing_path(dataset: str) -> Problem:
    """The problem of a dataset of files without files."""
    fix = 'set it to a file, a folder or a glob, or set training.dataset = "stdlib"'
    return Problem("training.dataset_path", f'dataset "{dataset}" needs it', fix, value=None)


# Left out: what is not part of the library proper, and one file that is a long generated table.
_NOT_LIBRARY = {
    "site-packages",
    "dist-packages",
    "__pycache__",
    "test",
    "tests",
    "idle_test",
    "idlelib",
    "lib2to3",
    "turtledemo",
    "pydoc_data",
    "encodings",
    "ensurepip",
}


def _stdlib(training: Training, data: Data) -> "Source":
    from torchtitan.data.files import DataFile
    from torchtitan.data.sources import TextSource

    root = sysconfig.get_paths()["stdlib"]
    files = []
    for folder, folders, names in os.walk(root):
        folders[:] = sorted(name for name in folders if name not in _NOT_LIBRARY)
        for name in sorted(names):
            path = os.path.join(folder, name)
            if name.endswith(".py") and os.access(path, os.R_OK) and os.path.getsize(path):
                files.append(DataFile(path, os.path.getsize(path)))
    if not files:
        raise ConfigError(
            Problem(
                "training.dataset",
                f"this Python has no sources of its standard library in {root}",
                "set training.dataset_path to text or JSON files of your own",
                value=training.dataset,
                missing_asset=True,
            )
        )
    return TextSource(files, _max_document_bytes(data))


register_dataset("stdlib", _stdlib, "the sources of Python's standard library, on every machine")
register_dataset("json", _from_files, "JSON lines or arrays, also .gz and .zst", needs_path=True)
register_dataset("text", _from_files, "text files, also .gz and .zst", needs_path=True)
register_dataset("tokens", _tokens, "what `torchtitan tokenize` has written", needs_path=True)
register_dataset("auto", _from_files, "JSON, text or tokens, by the files", needs_path=True)
