"""Datasets of the Hugging Face hub, and folders that its `datasets` library reads.

A hub dataset is streamed, file by file, unless `data.streaming = false` has it downloaded and
prepared first. Only formats that are data are read: neither scripts nor pickles.
"""

import contextlib
import os
import re
import threading
import time
from collections.abc import Iterator
from typing import Any, NamedTuple

from torchtitan.config import ConfigError, ConfigIssue
from torchtitan.config.schema import Data, Training
from torchtitan.config.suggest import did_you_mean
from torchtitan.data.files import DataFile
from torchtitan.data.sources import Source
from torchtitan.data.sources_torch import MapSource, StreamSource, in_short

_FORMATS = ("arrow", "cache", "csv", "json", "parquet", "text")
"""Names of the library's readers; `cache` is what it has prepared before."""
_TITLES = "Parquet, JSON, CSV, Arrow or text"
_TRIES = 3
_PAUSE_SECONDS = 1.0
_ANSWER_SECONDS = 4.0
_MOST_SECONDS = 8.0
"""For all tries together; looking up a name may take longer, and no library bounds that."""


class _Wanted(NamedTuple):
    """The part of a dataset to read; the keys of `[data]` have the same names."""

    path: str
    """`owner/name` on the hub, or a local folder."""
    subset: str | None
    split: str
    revision: str | None
    streaming: bool
    key: str
    """The key of the config that named the dataset, for messages."""
    value: str
    """The value of that key."""


def hub_source(path: str, training: Training, data: Data, split: str, subset: str | None) -> Source:
    """Return the dataset `owner/name` of the hub, or the one in the folder `path`, as a source.

    Raises ConfigError for whatever prevents reading it.
    """
    is_local = os.path.isdir(path)
    key = "training.dataset_path" if is_local else "training.dataset"
    value = (training.dataset_path or "") if is_local else training.dataset
    wanted = _Wanted(path, subset, split, data.revision, data.streaming, key, value)
    description: dict[str, Any] = {"subset": subset, "split": split}
    if is_local and _is_saved(path):
        dataset = _load_saved(wanted)
        names = [item["filename"] for item in dataset.cache_files]
    else:
        dataset, commit, names = _load(wanted, is_local)
        description |= {} if is_local else {"commit": commit}
    files = _local_files(names) if is_local else []
    if is_local:
        description["files"] = _sizes(path, files)
    dataset = _select(dataset, data.text_column)
    # A folder may move; an id of the hub may not.
    name = os.path.basename(os.path.normpath(path)) if is_local else path
    kind = MapSource if hasattr(dataset, "__len__") else StreamSource
    source = kind(dataset, name, data.text_column, data.max_document_bytes, **description)
    source.files = files
    return source


def _is_saved(folder: str) -> bool:
    """Tell whether `save_to_disk` wrote the folder."""
    return any(
        os.path.isfile(os.path.join(folder, name)) for name in ("state.json", "dataset_dict.json")
    )


def _load_saved(wanted: _Wanted) -> Any:
    import datasets  # type: ignore[import-untyped]

    for key in ("subset", "revision"):
        if getattr(wanted, key) is not None:
            problem = "a folder that save_to_disk wrote has none"
            value = getattr(wanted, key)
            raise ConfigError(ConfigIssue(f"data.{key}", problem, "remove it", value=value))
    try:
        dataset = datasets.load_from_disk(wanted.path)
    except Exception as error:
        raise _unreadable(wanted, error) from error
    if not isinstance(dataset, datasets.DatasetDict):
        return dataset
    if wanted.split not in dataset:
        raise _no_split(wanted, list(dataset))
    return dataset[wanted.split]


def _local_files(names: list[str]) -> list[DataFile]:
    return [DataFile(name, os.path.getsize(name)) for name in sorted(names) if os.path.isfile(name)]


def _sizes(folder: str, files: list[DataFile]) -> list[list[Any]]:
    """Return the names of files in the folder, which may move, and their bytes."""
    return [
        [os.path.relpath(os.path.abspath(file.path), os.path.abspath(folder)), file.size]
        for file in files
    ]


def _load(wanted: _Wanted, is_local: bool) -> tuple[Any, str | None, list[str]]:
    """The dataset, the commit of the hub it is from, and the names of its split's files."""
    import datasets

    options = {"name": wanted.subset, "revision": wanted.revision}
    try:
        with contextlib.nullcontext() if is_local else offline_if_unreachable():
            builder = datasets.load_dataset_builder(wanted.path, **options)
        format_name = type(builder).__module__.rpartition(".")[2]
        if format_name not in _FORMATS:
            problem = f"its files are read as {format_name!r}, which is not supported"
            fix = f"use a dataset of {_TITLES} files"
            raise ConfigError(ConfigIssue(wanted.key, problem, fix, value=wanted.value))
        if wanted.streaming:
            splits: Any = builder.as_streaming_dataset()
            if wanted.split not in splits:
                raise _no_split(wanted, list(splits))
            return splits[wanted.split], builder.hash, _files_of(builder, wanted.split)
        builder.download_and_prepare()
        assert builder.info.splits is not None
        name = wanted.split.partition("[")[0]  # "train[:10%]" is a part of "train"
        if name not in builder.info.splits:
            raise _no_split(wanted, list(builder.info.splits))
        dataset = builder.as_dataset(split=wanted.split)
        return dataset, builder.hash, _files_of(builder, name)
    except ConfigError:
        raise
    except Exception as error:
        raise _unreadable(wanted, error) from error


def _files_of(builder: Any, split: str) -> list[str]:
    files = builder.config.data_files or {}
    return [str(file) for file in files.get(split, ())]


def _select(dataset: Any, column: str) -> Any:
    """The dataset with nothing but the column of the text, if its columns are known."""
    features = dataset.features
    if features is None:
        return dataset
    if column not in features:
        names = ", ".join(map(repr, features)) or "none"
        problem = f"there is no column {column!r}; the columns are {names}"
        fix = "set it to the column that holds the text"
        raise ConfigError(ConfigIssue("data.text_column", problem, fix, value=column))
    kind = features[column]
    inner = getattr(kind, "feature", kind)
    dtype = str(getattr(inner, "dtype", type(inner).__name__))
    if not (dtype in ("string", "large_string") or (inner is not kind and "int" in dtype)):
        problem = f"column {column!r} holds {dtype} where text is expected"
        texts = [name for name, of in features.items() if getattr(of, "dtype", "") == "string"]
        fix = f"set one of {', '.join(texts)}" if texts else "use a dataset of text"
        raise ConfigError(ConfigIssue("data.text_column", problem, fix, value=column))
    return dataset.select_columns([column])


def _no_split(wanted: _Wanted, splits: list[Any]) -> ConfigError:
    names = [str(split) for split in splits]
    problem = f"{wanted.path} has no such split"
    fix = did_you_mean(wanted.split, names)
    return ConfigError(ConfigIssue("data.split", problem, fix, value=wanted.split))


def _unreadable(wanted: _Wanted, error: Exception) -> ConfigError:
    """Translate a failure of the library for the user."""
    import huggingface_hub.errors as hub
    from datasets.config import HF_HUB_OFFLINE  # type: ignore[import-untyped]
    from datasets.exceptions import (  # type: ignore[import-untyped]
        DataFilesNotFoundError,
        DatasetNotFoundError,
    )

    path = wanted.path
    causes = _causes(error)
    text = in_short(error)
    key, missing = wanted.key, False
    value: str | None = wanted.value

    def has(*kinds: type[BaseException]) -> bool:
        return any(isinstance(cause, kinds) for cause in causes)

    # The library re-raises some of them as text.
    if has(hub.GatedRepoError) or "is a gated dataset" in text:
        problem = f"{path} is gated: its owner has to grant access"
        fix = "ask for access on its page, and set HF_TOKEN to a token of the account that has it"
    elif has(hub.RevisionNotFoundError) or text.startswith("DatasetNotFoundError: Revision"):
        key, value = "data.revision", wanted.revision or "main"
        problem = f"{path} has no such revision"
        fix = "set a branch, a tag or a commit that its page lists"
    elif has(hub.RepositoryNotFoundError) or "doesn't exist on the Hub or cannot be" in text:
        problem = f"there is no dataset {path} on the hub, or it is private"
        fix = "correct the name; for a private one, set HF_TOKEN to a token that may read it"
    elif _is_offline(causes):
        missing = True
        obstacle = "the hub cannot be reached"
        if HF_HUB_OFFLINE:
            obstacle = "HF_HUB_OFFLINE forbids to ask the hub"
        problem = f"{path} is not on this machine, and {obstacle}"
        fix = (
            "download it where there is a network, and read the folder with"
            ' dataset = "hf", or give this machine access'
        )
    elif has(hub.HfHubHTTPError):
        problem, fix = f"the hub refused {path}: {text}", "try again later, or use a local copy"
    elif "BuilderConfig" in text or "Config name is missing" in str(error):
        key, value = "data.subset", wanted.subset
        names = re.findall(r"'([^']+)'", str(error).partition("[")[2].partition("]")[0])
        problem = f"{path} has no such subset"
        if wanted.subset is None:
            problem = f"{path} has {len(names)} subsets, of which one has to be named"
        fix = did_you_mean(wanted.subset or "", names)
    elif has(DataFilesNotFoundError, DatasetNotFoundError) or "EmptyDataset" in repr(causes):
        problem = f"{path} holds no files of a known format"
        fix = f"give one with {_TITLES} files"
    else:
        problem, fix = f"{path} cannot be read: {text}", "correct or replace the dataset"
    return ConfigError(ConfigIssue(key, problem, fix, value=value, missing_asset=missing))


def _is_offline(causes: list[BaseException]) -> bool:
    # By name: huggingface_hub has changed its HTTP library once already.
    names = {"ConnectError", "ConnectTimeout", "ReadTimeout", "OfflineModeIsEnabled"}
    return any(
        isinstance(cause, ConnectionError) or type(cause).__name__ in names for cause in causes
    )


def _causes(error: BaseException) -> list[BaseException]:
    causes: list[BaseException] = []
    link: BaseException | None = error
    while link is not None and link not in causes:
        causes.append(link)
        link = link.__cause__ or link.__context__
    return causes


@contextlib.contextmanager
def offline_if_unreachable() -> Iterator[None]:
    """While entered, `datasets` uses what it has on the disk if the hub does not answer."""
    from datasets import config  # type: ignore[import-untyped]

    before = config.HF_HUB_OFFLINE
    config.HF_HUB_OFFLINE = before or not _answers(config.HF_ENDPOINT)
    try:
        yield
    finally:
        config.HF_HUB_OFFLINE = before


def _answers(endpoint: str) -> bool:
    """Tell whether the hub answers at all; the library reports an error in the answer."""
    from huggingface_hub.utils import get_session

    answered = threading.Event()

    def ask() -> None:
        for attempt in range(_TRIES):
            if attempt:
                time.sleep(_PAUSE_SECONDS)
            with contextlib.suppress(Exception):
                get_session().head(endpoint, timeout=_ANSWER_SECONDS)
                answered.set()
                return

    asking = threading.Thread(target=ask, name="hub", daemon=True)
    asking.start()
    asking.join(_MOST_SECONDS)
    return answered.is_set()
