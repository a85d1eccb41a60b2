"""How the data of a run differ from those of a checkpoint. No torch.

A checkpoint keeps a digest of everything that a place in the data depends on (`data_facts` in
`loader.py`), to be compared, and a summary of it, to say what differs.
"""

import hashlib
import json
from collections.abc import Mapping
from typing import Any

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
"""Fact -> the config key that decides it."""


def fingerprint_of(facts: Mapping[str, Any]) -> str:
    """The digest of facts."""
    return _digest(facts)


def names_data(stored: str | None, facts: Mapping[str, Any]) -> bool:
    """Tell whether a stored fingerprint is that of `facts`, or none at all. One from before files
    had digests is accepted where the rest is equal."""
    former = {**facts, "data": _without_digests(facts["data"])}
    return stored in (None, fingerprint_of(facts), fingerprint_of(former))


def summary_of(facts: Mapping[str, Any]) -> dict[str, Any]:
    """Return facts short enough for a manifest: long lists of files are counted, other long values
    are replaced by their digest."""
    data = facts["data"]
    described = data if isinstance(data, list) else [{"data": data}]
    short = [{**one, "data": _short_description(one["data"])} for one in described]
    summary: dict[str, Any] = json.loads(json.dumps({**facts, "data": short}))
    return summary


def differences(
    stored: Mapping[str, Any] | None, now: Mapping[str, Any], anew: bool = False
) -> dict[str, str]:
    """What differs between a stored summary and the one of today: config key -> how. A checkpoint
    of an older version has no summary."""
    if anew:  # all but the tokenizer may be others where the data begin anew
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
        short["files"] = {"count": len(files), "bytes": sizes, "digest": _digest(files)}
    elif files is not None:
        short["files"] = _short_value(files)
    return short


def _short_value(value: Any) -> Any:
    return value if len(json.dumps(value)) <= _MAX_CHARACTERS else {"digest": _digest(value)}


def _digest(value: Any) -> str:
    return hashlib.sha256(json.dumps(value, sort_keys=True).encode()).hexdigest()


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
    """The fingerprint of a tokenizer without what documents are put between."""
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
    if not texts:
        return "the files are in another order"
    more = [f"and {len(texts) - _MAX_LISTED} more"] if len(texts) > _MAX_LISTED else []
    return ", ".join([*texts[:_MAX_LISTED], *more])


def _same_content(old: list[Any], new: list[Any]) -> bool:
    """Compare sizes, and digests where both were taken in the same way: an old checkpoint has none,
    and with other files beside it a file is sampled at other places."""
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
