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
from typing import Any

from torchtitan.config import ConfigError, ConfigIssue
from torchtitan.config.schema import Data, Training
from torchtitan.config.suggest import did_you_mean
from torchtitan.data.chat_formats import chat_format
from torchtitan.data.decode import transient_cause
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


def hub_source(path: str, training: Training, data: Data) -> Source:
    """Return the dataset `owner/name` of the hub, or the one in the folder `path`, as a source.

    Raises ConfigError for whatever prevents reading it.
    """
    is_local = os.path.isdir(path)
    files: list[DataFile] = []
    description: dict[str, Any] = {"subset": data.subset, "split": data.split}
    try:
        if is_local and _is_saved(path):
            dataset = _load_saved(path, data)
            names = [item["filename"] for item in dataset.cache_files]
        else:
            dataset, commit, names = _load(path, data, is_local)
            description |= {} if is_local else {"commit": commit}
    except ConfigError:
        raise
    except Exception as error:
        key = "dataset_path" if is_local else "dataset"
        issue = _unreadable(path, data, error, f"training.{key}", getattr(training, key))
        raise ConfigError(issue) from error
    if is_local:
        files = [
            DataFile(name, os.path.getsize(name)) for name in sorted(names) if os.path.isfile(name)
        ]
        # A folder may move, so the names are relative to it.
        folder = os.path.abspath(path)
        description["files"] = [
            [os.path.relpath(os.path.abspath(file.path), folder), file.size] for file in files
        ]
    dataset = _select(dataset, data)
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


def _load_saved(path: str, data: Data) -> Any:
    import datasets  # type: ignore[import-untyped]

    for key in ("subset", "revision"):
        value = getattr(data, key)
        if value is not None:
            problem = "a folder that save_to_disk wrote has none"
            raise ConfigError(ConfigIssue(f"data.{key}", problem, "remove it", value=value))
    dataset = datasets.load_from_disk(path)
    if not isinstance(dataset, datasets.DatasetDict):
        return dataset
    return dataset[_require_split(path, data.split, list(dataset))]


def _load(path: str, data: Data, is_local: bool) -> tuple[Any, str | None, list[str]]:
    """The dataset, the commit of the hub it is from, and the names of its split's files."""
    import datasets

    with contextlib.nullcontext() if is_local else offline_if_unreachable():
        builder = datasets.load_dataset_builder(path, name=data.subset, revision=data.revision)
    format_name = type(builder).__module__.rpartition(".")[2]
    if format_name not in _FORMATS:
        raise _UnknownFormat(f"its files are read as {format_name!r}, which is not supported")
    if data.streaming:
        splits: Any = builder.as_streaming_dataset()
        name = _require_split(path, data.split, list(splits))
        return splits[name], builder.hash, _files_of(builder, name)
    builder.download_and_prepare()
    assert builder.info.splits is not None
    # "train[:10%]" is a part of "train"
    name = _require_split(path, data.split.partition("[")[0], list(builder.info.splits))
    return builder.as_dataset(split=data.split), builder.hash, _files_of(builder, name)


def _files_of(builder: Any, split: str) -> list[str]:
    files = builder.config.data_files or {}
    return [str(file) for file in files.get(split, ())]


def _select(dataset: Any, data: Data) -> Any:
    """The dataset with nothing but the columns that are read, if its columns are known."""
    features, column, chat = dataset.features, data.text_column, chat_format(data)
    if features is None:
        return dataset
    if chat is not None:
        if flaw := chat.missing(list(features)):
            fix = "set it to what they hold, or name them in data.columns"
            raise ConfigError(ConfigIssue("data.format", flaw, fix, data.format))
        return dataset.select_columns([name for name in chat.columns if name in features])
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


def _require_split(path: str, split: str, splits: list[Any]) -> str:
    """Return `split`. Raises ConfigError if it is not one of `splits`."""
    names = [str(name) for name in splits]
    if split not in names:
        fix = did_you_mean(split, names)
        raise ConfigError(ConfigIssue("data.split", f"{path} has no such split", fix, split))
    return split


class _UnknownFormat(Exception):
    """The files are of a format that is not data."""


def _unreadable(
    path: str, data: Data, error: Exception, key: str, value: str | None
) -> ConfigIssue:
    """Translate a failure of the library for the user; `key` and `value` name the dataset."""
    import huggingface_hub.errors as hub
    from datasets.config import HF_HUB_OFFLINE  # type: ignore[import-untyped]
    from datasets.exceptions import (  # type: ignore[import-untyped]
        DataFilesNotFoundError,
        DatasetNotFoundError,
    )

    causes, text, missing = _causes(error), in_short(error), False

    def has(*kinds: type[BaseException]) -> bool:
        return any(isinstance(cause, kinds) for cause in causes)

    # The library re-raises some of them as text.
    if isinstance(error, _UnknownFormat):
        problem, fix = str(error), f"use a dataset of {_TITLES} files"
    elif has(hub.GatedRepoError) or "is a gated dataset" in text:
        problem = f"{path} is gated: its owner has to grant access"
        fix = "ask for access on its page, and set HF_TOKEN to a token of the account that has it"
    elif has(hub.RevisionNotFoundError) or text.startswith("DatasetNotFoundError: Revision"):
        key, value = "data.revision", data.revision or "main"
        problem = f"{path} has no such revision"
        fix = "set a branch, a tag or a commit that its page lists"
    elif has(hub.RepositoryNotFoundError) or "doesn't exist on the Hub or cannot be" in text:
        problem = f"there is no dataset {path} on the hub, or it is private"
        fix = "correct the name; for a private one, set HF_TOKEN to a token that may read it"
    elif _is_offline(causes):
        missing = True
        offline = "HF_HUB_OFFLINE forbids to ask the hub"
        obstacle = offline if HF_HUB_OFFLINE else "the hub cannot be reached"
        problem = f"{path} is not on this machine, and {obstacle}"
        fix = (
            "download it where there is a network, and read the folder with"
            ' dataset = "hf", or give this machine access'
        )
    elif has(hub.HfHubHTTPError):
        problem, fix = f"the hub refused {path}: {text}", "try again later, or use a local copy"
    elif transient_cause(error) is not None:
        problem, fix = f"{path} could not be read to the end: {text}", "try again"
    elif "BuilderConfig" in text or "Config name is missing" in str(error):
        key, value = "data.subset", data.subset
        names = re.findall(r"'([^']+)'", str(error).partition("[")[2].partition("]")[0])
        problem = f"{path} has no such subset"
        if data.subset is None:
            problem = f"{path} has {len(names)} subsets, of which one has to be named"
        fix = did_you_mean(data.subset or "", names)
    elif has(DataFilesNotFoundError, DatasetNotFoundError) or "EmptyDataset" in repr(causes):
        problem = f"{path} holds no files of a known format"
        fix = f"give one with {_TITLES} files"
    else:
        problem, fix = f"{path} cannot be read: {text}", "correct or replace the dataset"
    return ConfigIssue(key, problem, fix, value=value, missing_asset=missing)


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
