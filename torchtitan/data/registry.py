"""Datasets by name. Importing this module imports neither torch nor numpy.

Others join with `register_dataset`, or by an entry point of the group `torchtitan.datasets` that
gives a factory or a `DatasetEntry`.
"""

import os
import re
import sysconfig
from collections.abc import Callable
from dataclasses import dataclass, replace
from functools import partial
from typing import TYPE_CHECKING, Any

from torchtitan.config import ConfigError, ConfigIssue
from torchtitan.config.registry import Registry, calling_module
from torchtitan.config.schema import Data, Training
from torchtitan.config.suggest import fix_of_registered
from torchtitan.data.c4 import c4, c4_test, c4_validation
from torchtitan.utils.remote import RemoteError, is_remote, local_copy

if TYPE_CHECKING:
    from torchtitan.data.sources import Source

HUB_PREFIX = "hf:"
_HUB_ID = re.compile(r"[\w.-]+(/[\w.-]+)?", re.ASCII)

Factory = Callable[[Training, Data], Any]


@dataclass(frozen=True)
class DatasetEntry:
    """A registered dataset."""

    name: str
    factory: Factory
    description: str
    """One line for `torchtitan list datasets`."""
    needs_path: bool = False
    """`training.dataset_path` must be set."""
    takes_path: bool = True
    """`training.dataset_path` may be set."""
    takes_hub_keys: bool = False
    """`data.subset`, `data.revision` and `data.streaming` apply."""
    takes_split: bool = False
    """`data.split` applies."""


def _entry(name: str, thing: Any) -> DatasetEntry:
    """Return the entry of what is registered under `name`. Raises TypeError."""
    if isinstance(thing, DatasetEntry):
        if thing.name != name:
            raise TypeError(f"it calls itself {thing.name!r}, and its entry point {name!r}")
        return thing
    if not callable(thing):
        raise TypeError(f"the dataset {name} is neither a function nor a DatasetEntry")
    description = (getattr(thing, "__doc__", None) or "").strip().partition("\n")[0]
    return DatasetEntry(name, thing, description)


DATASETS: Registry[DatasetEntry] = Registry("training.dataset", "torchtitan.datasets", _entry)


def register_dataset(
    name: str,
    factory: Factory,
    description: str = "",
    needs_path: bool = False,
    takes_path: bool = True,
) -> None:
    """Register the dataset `training.dataset = name`; `factory(training, data)` builds it.

    The factory returns a torch `Dataset` or `IterableDataset`, a torchdata node or loader, an
    object with `state_dict` and `load_state_dict` that yields rows, or a Source. It raises
    ConfigError for what the user can correct. Raises ValueError for a taken name.
    """
    if name.startswith(HUB_PREFIX):
        raise ValueError(f"{name!r} names a dataset of the hub")
    entry = DatasetEntry(name, factory, description, needs_path, takes_path)
    DATASETS.register(name, entry, calling_module())


def datasets() -> dict[str, DatasetEntry]:
    """Return all datasets that can be imported, by name."""
    return DATASETS.entries()


def find_dataset(name: str) -> DatasetEntry | None:
    """Return the dataset of that name; any `hf:owner/name` is one."""
    if name.startswith(HUB_PREFIX) and _HUB_ID.fullmatch(name[len(HUB_PREFIX) :]):
        return DatasetEntry(
            name, _from_hub, "", takes_path=False, takes_hub_keys=True, takes_split=True
        )
    return DATASETS.get(name)


def build_source(training: Training, data: Data) -> "Source":
    """Return the dataset that the config names. Raises ConfigError."""
    entry = find_dataset(training.dataset)
    if entry is None:
        raise ConfigError(unknown_dataset(training.dataset))
    if entry.needs_path and training.dataset_path is None:
        raise ConfigError(missing_path(training.dataset))
    from torchtitan.data.sources_torch import as_source

    training = _with_local_path(training)
    make = partial(entry.factory, training, data)
    return as_source(make, training.dataset, data.text_column, data.max_document_bytes)


def _with_local_path(training: Training) -> Training:
    """Return the section with the copy on this machine of files in an object store.

    Lanes jump in files, and rows are located again after a resume: a copy gives both exactly, at
    the price of the disk. Raises ConfigError.
    """
    path = training.dataset_path
    if path is None or not is_remote(path):
        return training
    try:
        copy = local_copy(path)
    except RemoteError as error:
        fix = "check the path, the credentials and the network"
        issue = ConfigIssue("training.dataset_path", str(error), fix, path)
        raise ConfigError(replace(issue, missing_asset=error.missing)) from error
    return training.model_copy(update={"dataset_path": str(copy)})


def unknown_dataset(name: str) -> ConfigIssue:
    """Return the problem of an unknown name."""
    if name.startswith(HUB_PREFIX):
        fix = f'write "{HUB_PREFIX}owner/name"'
        return ConfigIssue("training.dataset", "is not the id of a dataset", fix, value=name)
    fix = fix_of_registered(name, sorted(DATASETS))
    if "/" in name:
        fix = f'write "{HUB_PREFIX}{name}" for a dataset of the Hugging Face hub'
    return ConfigIssue("training.dataset", "is unknown", fix, value=name)


def _from_files(training: Training, data: Data) -> "Source":
    from torchtitan.data.token_files import is_token_folder

    path, wanted = training.dataset_path or "", training.dataset
    if is_token_folder(path):
        if wanted == "auto":
            return _tokens(training, data)
        problem, fix = "holds tokens", 'set dataset = "tokens", or "auto"'
        raise ConfigError(ConfigIssue("training.dataset_path", problem, fix, path))
    return file_source(path, wanted, data)


def file_source(path: str, kind: str, data: Data) -> "Source":
    """Return the files at `path` as a source; `kind` is a `Kind` or "auto". Raises ConfigError."""
    from torchtitan.data.listing import list_files
    from torchtitan.data.sources_json import JsonSource
    from torchtitan.data.sources_parquet import ParquetSource
    from torchtitan.data.sources_text import TextSource

    listing = list_files(path, kind)
    kinds = {"text": TextSource, "parquet": ParquetSource, "json": JsonSource}
    source: Any = kinds[listing.kind](listing.files, data)
    source.listing = listing
    return source  # type: ignore[no-any-return]


def _from_hub(training: Training, data: Data) -> "Source":
    from torchtitan.data.sources_hub import hub_source

    path = training.dataset.removeprefix(HUB_PREFIX)
    return hub_source(path, training, data)


def _from_folder(training: Training, data: Data) -> "Source":
    from torchtitan.data.sources_hub import hub_source

    folder = os.path.expanduser(training.dataset_path or "")
    if not os.path.isdir(folder):
        raise ConfigError(
            ConfigIssue(
                "training.dataset_path",
                f"{os.path.abspath(folder)} is not a folder",
                f'correct it; for a dataset of the hub set dataset = "{HUB_PREFIX}owner/name"',
                value=training.dataset_path,
                missing_asset=True,
            )
        )
    return hub_source(folder, training, data)


def _tokens(training: Training, data: Data) -> "Source":
    from torchtitan.data.token_source import TokenSource

    return TokenSource(training.dataset_path or "")


def missing_path(dataset: str) -> ConfigIssue:
    """Return the problem of a dataset of files without a path."""
    fix = 'set it to a file, a folder or a glob, or set dataset = "stdlib"'
    return ConfigIssue("training.dataset_path", f'dataset "{dataset}" needs it', fix, value=None)


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
    from torchtitan.data.sources_text import TextSource

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
            ConfigIssue(
                "training.dataset",
                f"this Python has no sources of its standard library in {root}",
                "give the path of text or JSON files",
                value=training.dataset,
                missing_asset=True,
            )
        )
    return TextSource(files, data)


for _entry_of in (
    DatasetEntry(
        "stdlib",
        _stdlib,
        "the sources of Python's standard library, on every machine",
        takes_path=False,
    ),
    DatasetEntry("json", _from_files, "JSON lines or arrays, also compressed", needs_path=True),
    DatasetEntry("text", _from_files, "text files, also compressed", needs_path=True),
    DatasetEntry("parquet", _from_files, "Parquet files", needs_path=True),
    DatasetEntry("tokens", _tokens, "what `torchtitan tokenize` has written", needs_path=True),
    DatasetEntry("auto", _from_files, "one of these four, by the files", needs_path=True),
    DatasetEntry("c4", c4, "C4, from a folder or the hub", takes_hub_keys=True),
    DatasetEntry("c4_validation", c4_validation, "C4's validation split", takes_hub_keys=True),
    *(
        DatasetEntry(name, c4_test, "a few hundred documents in C4's layout, for tests")
        for name in ("c4_test", "c4_mini")
    ),
    DatasetEntry(
        "hf",
        _from_folder,
        f'a folder that Hugging Face datasets reads; "{HUB_PREFIX}owner/name" is one of the hub',
        needs_path=True,
        takes_hub_keys=True,
        takes_split=True,
    ),
):
    DATASETS.add_built_in(_entry_of.name, _entry_of)
