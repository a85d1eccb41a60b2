"""The identity of a run's data: a fingerprint, a summary, and what a change of them means.

A place in the data depends on the files, the tokenizer and how the data are cut (`data_facts`). A
checkpoint keeps a digest of these facts to compare, and a summary to say what differs. Of file
contents a digest is taken: small data are read whole, large data in blocks at even distances.
"""

import hashlib
import json
import os
from collections.abc import Iterable, Mapping, Sequence
from concurrent.futures import ThreadPoolExecutor
from functools import lru_cache
from typing import Any

from torchtitan.config import ConfigError, ConfigIssue, DataError
from torchtitan.data.files import DataFile
from torchtitan.data.lanes import LaneSettings
from torchtitan.data.mixture import AnyPosition, MixedPosition, Mixture
from torchtitan.data.packing import Position
from torchtitan.data.token_source import TokenSource
from torchtitan.utils.text import format_bytes, some_of

_FORMAT = 1
"""Increased whenever the same files would give other samples."""
_MAX_FILES = 200
_MAX_CHARACTERS = 2000
_MAX_LISTED = 4
_SHOWN_CHARACTERS = 40
_KEYS = {
    "data": "training.dataset_path",
    "format": "torchtitan",
    "tokenizer": "model.tokenizer_path",
    "num_lanes": "data.lanes",
    "seq_len": "training.seq_len",
    "seed": "debug.seed",
    "shuffle": "data.shuffle",
}
"""Fact -> the config key that sets it."""


def fingerprint_of(facts: Any) -> str:
    """Return the digest of facts."""
    return hashlib.sha256(json.dumps(facts, sort_keys=True).encode()).hexdigest()


def names_data(stored: str | None, facts: Mapping[str, Any]) -> bool:
    """Tell whether a stored fingerprint is that of `facts`; None fits any.

    One from before files had digests is accepted where the rest is equal.
    """
    former = {**facts, "data": _without_digests(facts["data"])}
    return stored in (None, fingerprint_of(facts), fingerprint_of(former))


def summary_of(facts: Mapping[str, Any]) -> dict[str, Any]:
    """Return facts short enough for a manifest.

    Long lists of files are counted, other long values are replaced by their digest.
    """
    data = facts["data"]
    described = data if isinstance(data, list) else [{"data": data}]
    short = [{**one, "data": _short_description(one["data"])} for one in described]
    summary: dict[str, Any] = json.loads(json.dumps({**facts, "data": short}))
    return summary


def differences(
    stored: Mapping[str, Any] | None, now: Mapping[str, Any], anew: bool = False
) -> dict[str, str]:
    """Return the differences between two summaries: config key -> description.

    A checkpoint of an older version has no summary.
    """
    if anew:  # then all but the tokenizer may differ
        stored = {**now, "tokenizer": (stored or now).get("tokenizer")}
    if not stored:
        text = "the files, the tokenizer or how the data are cut; the checkpoint does not say which"
        return {_KEYS["data"]: text}
    found: dict[str, str] = {}
    for name in sorted({*stored, *now}):
        before, after = stored.get(name), now.get(name)
        if before == after:
            continue
        how = f"{_show(before)} in the checkpoint, {_show(after)} now"
        if name == "data" and before is not None and after is not None:
            how = _data_difference(before, after)
        elif name == "tokenizer" and _vocabulary(before) == _vocabulary(after):
            found |= _ends_difference(str(before), str(after))
            continue
        found[_KEYS.get(name, name)] = how
    return found


def _without_digests(description: Any) -> Any:
    if isinstance(description, list):
        return [{**of, "data": _without_digests(of["data"])} for of in description]
    if not isinstance(description.get("files"), list):
        return description
    return {**description, "files": [entry[:2] for entry in description["files"]]}


def _short_description(description: Mapping[str, Any]) -> dict[str, Any]:
    files = description.get("files")
    short = {key: _short_value(value) for key, value in description.items() if key != "files"}
    if isinstance(files, list) and len(files) <= _MAX_FILES:
        short["files"] = files
    elif isinstance(files, list):
        sizes = sum(file[1] for file in files)
        short["files"] = {"count": len(files), "bytes": sizes, "digest": fingerprint_of(files)}
    elif files is not None:
        short["files"] = _short_value(files)
    return short


def _short_value(value: Any) -> Any:
    is_short = len(json.dumps(value)) <= _MAX_CHARACTERS
    return value if is_short else {"digest": fingerprint_of(value)}


def _data_difference(before: list[dict[str, Any]], now: list[dict[str, Any]]) -> str:
    if len(before) != len(now):
        return f"{len(before)} sources in the checkpoint, {len(now)} now"
    texts = []
    for index, (old, new) in enumerate(zip(before, now)):
        place = f"source {index}: " if len(now) > 1 else ""
        old, new = {**old, **old["data"]}, {**new, **new["data"]}
        for key in sorted({*old, *new} - {"data"}):
            if key == "files" and old.get(key) != new.get(key):
                texts.append(f"{place}{_file_difference(old.get(key), new.get(key))}")
            elif old.get(key) != new.get(key):
                shown = f"{_show(old.get(key))} in the checkpoint, {_show(new.get(key))} now"
                texts.append(f"{place}{key} is {shown}")
    return "; ".join(texts)


def _vocabulary(tokenizer: Any) -> str:
    """Return the fingerprint of a tokenizer without the ends of documents."""
    return str(tokenizer).partition("+")[0]


def _ends_difference(before: str, now: str) -> dict[str, str]:
    """Return what differs where one tokenizer puts documents between other tokens."""
    found: dict[str, str] = {}
    # Both tokens, or the only one, have no suffix (`DocumentTokenizer.fingerprint`).
    old, new = (fact.partition("+")[2] if "+" in fact else "boseos" for fact in (before, now))
    for key, end in (("data.add_eos", "eos"), ("data.add_bos", "bos")):
        if (end in old) != (end in new) and not (end == "bos" and found):
            was = str(end in old).lower()
            how = f"{was} in the checkpoint, {str(end in new).lower()} now"
            found[key] = f"{how}, as set or as the tokenizer's files say; set it to {was}"
    return found


def _file_difference(before: Any, now: Any) -> str:
    if not isinstance(before, list) or not isinstance(now, list):
        if _count(before) == _count(now):
            return f"some of the {_count(now)} have other names or another content"
        return f"{_count(before)} in the checkpoint, {_count(now)} now"
    old, new = {file[0]: file[1:] for file in before}, {file[0]: file[1:] for file in now}
    texts = [f"{name} is gone" for name in old if name not in new]
    texts += [f"{name} is new" for name in new if name not in old]
    for name in (name for name in old if name in new):
        if _same_content(old[name], new[name]):
            continue
        sizes = (old[name][:1], new[name][:1])
        text = "has other content at the same size"
        if sizes[0] != sizes[1]:
            text = f"had {sizes[0][0]:,} bytes and has {sizes[1][0]:,}"
        texts.append(f"{name} {text}")
    return some_of(texts, _MAX_LISTED) or "the files are in another order"


def _same_content(old: list[Any], new: list[Any]) -> bool:
    """Compare sizes, and digests where both were taken in the same way.

    An old checkpoint has none, and next to other files a file is sampled at other places.
    """
    if old[0] != new[0] or len(old) < 2 or len(new) < 2:
        return bool(old[0] == new[0])
    return bool(old[1] == new[1]) or old[1].partition(":")[0] != new[1].partition(":")[0]


def _count(files: Any) -> str:
    if isinstance(files, list):
        return f"{len(files):,} files of {sum(file[1] for file in files):,} bytes"
    if isinstance(files, Mapping) and "count" in files:
        return f"{files['count']:,} files of {files['bytes']:,} bytes"
    return "no files" if files is None else "other files"


def _show(value: Any) -> str:
    if value is None:
        return "unknown"
    text = str(value)
    return text if len(text) <= _SHOWN_CHARACTERS else f"{text[:_SHOWN_CHARACTERS]}..."


def data_facts(mixture: Mixture) -> dict[str, Any]:
    """Return everything that a place in the data depends on, as JSON. Raises DataError."""
    settings = mixture.sources[0]
    tokenizer = settings.tokenizer
    # The ends of documents that are tokens already are in the tokens.
    are_tokens = all(isinstance(of.source, TokenSource) for of in mixture.sources)
    return {
        "format": _FORMAT,
        "data": mixture.description(with_digests),
        "tokenizer": (tokenizer.tokenizer if are_tokens else tokenizer).fingerprint,
        "num_lanes": settings.num_lanes,
        "seq_len": settings.seq_len,
        "seed": settings.seed,
        "shuffle": settings.shuffle,
    }


_WHOLE_BYTES = 2**28
"""All files together, up to which they are read whole."""
_BLOCK_BYTES = 2**12
_MOST_BLOCKS, _FEWEST_BLOCKS = 64, 4
"""Blocks of one file."""
_ALL_BLOCKS = 2**18
_THREADS = 16
"""Most of the time goes into waiting, on a file system of the network."""


def content_digests(files: Sequence[DataFile]) -> list[str]:
    """Return a digest of each file. Raises DataError for one that cannot be read.

    What stands before the colon says how a file was sampled, which depends on the other files;
    digests with different ones cannot be compared.
    """
    keys = []
    for file in files:
        try:
            status = os.stat(file.path)
        except OSError as error:
            raise DataError(f"{file.path}: cannot be read: {error.strerror}") from error
        keys.append((file.path, status.st_size, status.st_mtime_ns))
    return list(_digests(tuple(keys)))


def with_digests(source: Any) -> dict[str, Any]:
    """Return the description of a source, with a digest of each of its files."""
    description: dict[str, Any] = source.description
    files: Sequence[DataFile] = getattr(source, "files", ())
    if not files or len(files) != len(description.get("files", ())):
        return description
    digests = content_digests(files)
    named = [[*entry, digest] for entry, digest in zip(description["files"], digests)]
    return {**description, "files": named}


@lru_cache(maxsize=8)
def _digests(files: tuple[tuple[str, int, int], ...]) -> tuple[str, ...]:
    total = sum(size for _, size, _ in files)
    blocks = min(_MOST_BLOCKS, max(_FEWEST_BLOCKS, _ALL_BLOCKS // max(1, len(files))))
    largest = _WHOLE_BYTES if total <= _WHOLE_BYTES else blocks * _BLOCK_BYTES

    def digest(file: tuple[str, int, int]) -> str:
        path, size, _ = file
        found = hashlib.blake2b(digest_size=8)
        try:
            with open(path, "rb", buffering=0) as stream:
                if size <= largest:
                    while part := stream.read(2**20):
                        found.update(part)
                else:
                    for number in range(blocks):
                        stream.seek((size - _BLOCK_BYTES) * number // (blocks - 1))
                        found.update(stream.read(_BLOCK_BYTES))
        except OSError as error:
            raise DataError(f"{path}: cannot be read: {error.strerror}") from error
        return f"{'all' if size <= largest else blocks}:{found.hexdigest()}"

    if len(files) < _THREADS:
        return tuple(map(digest, files))
    with ThreadPoolExecutor(_THREADS) as pool:
        return tuple(pool.map(digest, files))


def restart(mixture: Mixture, states: Iterable[Mapping[str, Any]]) -> AnyPosition:
    """Return the position at which all lanes begin new data: the epoch after all stored ones.

    Shares of several sources begin anew, too. Raises ConfigError if `data.epochs` are over by
    then.
    """
    epoch = _next_epoch(states)
    epochs = mixture.sources[0].epochs
    if epochs is not None and epoch >= epochs:
        problem = f"data.restart would begin epoch {epoch}, and epochs 0 to {epochs - 1} are read"
        fix = f"set it to at least {epoch + 1}, or remove it"
        raise ConfigError(ConfigIssue("data.epochs", problem, fix, epochs))
    start = Position(epoch=epoch, first_epoch=epoch)
    count = len(mixture.sources)
    return MixedPosition(0, (0,) * count, (start,) * count) if count > 1 else start


def describe_change(mixture: Mixture, states: Iterable[Mapping[str, Any]], anew: bool) -> str:
    """Describe a resume with other data in numbers; `anew` with `data.restart`."""
    states = list(states)
    parts = []
    for name, settings, places in zip(mixture.names, mixture.sources, zip(*map(_places, states))):
        done = _epochs_done(settings, places)
        text = f"{done % 1:.0%} through epoch {int(done)}"
        text += ", the rest of which is not read" if anew else f": {_mixed_up(settings, done % 1)}"
        parts.append(f"{name}: {text}" if len(mixture.sources) > 1 else text)
    where = "; ".join(parts)
    if anew:
        return (
            f"The data differ from the checkpoint's: epoch {_next_epoch(states)} starts over with"
            f" them. The checkpoint was {where}"
        )
    return (
        f"The data are not the checkpoint's, which was {where}."
        " data.restart = true would start over with the next epoch"
    )


def _mixed_up(settings: LaneSettings, done: float) -> str:
    """Describe the rest of the epoch, at worst, `done` of which are read.

    The true share depends on the two orders: if they have nothing in common, it is `done * (1 -
    done)`.
    """
    share = min(done, 1 - done)
    total = sum(file.size for file in getattr(settings.source, "files", ()))
    amount = f" ({format_bytes(share * total)} of {format_bytes(total)})" if total else ""
    what = f"up to {share:.0%} of the data{amount}"
    return f"{what} are read twice in this epoch, and as much not at all"


def _epochs_done(settings: LaneSettings, places: Sequence[Mapping[str, Any]]) -> float:
    """Return the epochs read by all lanes, on average; the rest of current shards is a guess."""
    own = max(1.0, len(settings.shards) / settings.num_lanes)
    total = 0.0
    for place in places:
        inside = 0.5 if place["block"] or place["row"] or place["token"] else 0.0
        total += place["epoch"] + min(1.0, (place["shard"] + inside) / own)
    return total / len(places)


def _next_epoch(states: Iterable[Mapping[str, Any]]) -> int:
    """Return the first epoch that no lane has begun."""
    return 1 + max(place["epoch"] for state in states for place in _places(state))


def _places(state: Mapping[str, Any]) -> list[Mapping[str, Any]]:
    """Return the place of a lane in each source."""
    places: list[Mapping[str, Any]] = state.get("sources", [state])
    return places
