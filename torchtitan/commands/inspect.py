"""`torchtitan inspect`: what a checkpoint holds and whether it is intact, or how two differ."""

from __future__ import annotations

import argparse
import itertools
import json
import math
import sys
from collections import Counter
from collections.abc import Mapping, Sequence
from pathlib import Path
from typing import TYPE_CHECKING, Any

from torchtitan.checkpoint.manifest import OPTIMIZER_PREFIX
from torchtitan.commands.printing import Progress, aligned
from torchtitan.config.errors import CheckpointError, ConfigError
from torchtitan.config.exit_codes import CHECKPOINT, DONE, NON_FINITE
from torchtitan.config.paths import expand_path
from torchtitan.utils.text import format_bytes, plural

if TYPE_CHECKING:
    from torchtitan.checkpoint.contents import Contents
    from torchtitan.checkpoint.manifest import Manifest

_KINDS = {
    "step": "a step of this library",
    "dcp": "a folder of torch.distributed.checkpoint",
    "hf": "a Hugging Face folder",
    "meta": "a folder of Meta's",
    "gguf": "a GGUF file",
}
_ROWS = 20
"""Weights in the table of differences; a model has hundreds."""


def run(options: argparse.Namespace) -> int:
    """Print the report; exit status 0, or that of damage, or of weights that are not finite."""
    paths = [options.checkpoint, *([options.other] if options.other else [])]
    opened = [_open(path) for path in paths]
    everything = [contents for contents, _ in opened]
    if not options.headers:
        for contents in everything:
            _verify(contents)
    if len(opened) == 2:
        report = _comparison(everything, options.headers)
        lines = _comparison_lines(report)
    else:
        report = _summary(everything[0], options.headers)
        lines = _summary_lines(report)
    faults = [fault for _, of_run in opened for fault in of_run]
    report["damaged"] = faults
    print(json.dumps(report, ensure_ascii=False) if options.json else "\n".join(lines))
    for fault in faults:
        print(f"damaged: {fault}", file=sys.stderr)
    if faults:
        return CHECKPOINT
    tensors = report.get("tensors", {})
    broken = [name for name, entry in tensors.items() if entry.get("non_finite")]
    if broken:
        print(f"not finite: {', '.join(broken)}", file=sys.stderr)
    return NON_FINITE if broken else DONE


def _open(given: str) -> tuple[Contents, list[str]]:
    """Return the checkpoint, and the faults of other steps of its run."""
    from torchtitan.checkpoint.contents import open_contents
    from torchtitan.checkpoint.dcp_io import quiet_dcp
    from torchtitan.checkpoint.manifest import InvalidCheckpoint
    from torchtitan.training.pretrained import find_checkpoint, under_command_key
    from torchtitan.weights.recognise import InvalidWeights, UnreadableDescription

    quiet_dcp()
    path, faults = find_checkpoint(expand_path(given))
    with under_command_key():
        try:
            return open_contents(path), faults
        except (InvalidCheckpoint, InvalidWeights, UnreadableDescription) as error:
            raise CheckpointError(str(error)) from error


def _verify(contents: Contents) -> None:
    """Compare every file of a step with its digest. Raises CheckpointError."""
    from torchtitan.checkpoint.manifest import damaged_files

    if contents.manifest is None:
        return
    progress = Progress("verifying", contents.manifest.num_bytes)
    files = {contents.path / name: entry for name, entry in contents.manifest.files.items()}
    if faults := damaged_files(files, progress.add):
        raise CheckpointError("; ".join(faults.values()))


def _summary(contents: Contents, headers: bool) -> dict[str, Any]:
    """Return everything that is known about a checkpoint, as JSON values."""
    from torchtitan.checkpoint.contents import num_bytes
    from torchtitan.weights.description import effective

    tensors = {name: dict(entry) for name, entry in contents.tensors.items()}
    report: dict[str, Any] = {
        "path": str(contents.path),
        "kind": contents.kind,
        "family": contents.family,
        "parameters": sum(math.prod(entry["shape"]) for entry in tensors.values()),
        "bytes": sum(map(num_bytes, tensors.values())),
        "dtypes": dict(Counter(entry["dtype"] for entry in tensors.values())),
        "hyper_parameters": None if contents.args is None else effective(contents.args),
        "tokenizer": _tokenizer(contents.path),
        "notices": list(contents.notices),
    }
    if contents.manifest is not None:
        report |= _run_facts(contents.manifest)
        optimizer = contents.optimizer
        size = sum(map(num_bytes, optimizer.values()))
        report["optimizer"] = {"tensors": len(optimizer), "bytes": size}
    if not headers:
        for name, values in _measured(contents, report["bytes"]).items():
            tensors[name] |= values
    return report | {"tensors": tensors}


def _run_facts(manifest: Manifest) -> dict[str, Any]:
    """Return what a manifest says about the run and its place in the data."""
    state, info = manifest.state, manifest.info
    lanes = state.get("lane_states") or {}
    return {
        "step": manifest.step,
        "run_id": manifest.run_id,
        "finished": state.get("finished"),
        "model_only": manifest.model_only,
        "tokens_seen": state.get("num_tokens_seen"),
        "lanes": len(lanes),
        "epochs": sorted({epoch for lane in lanes.values() for epoch in _epochs(lane)}),
        "data": state.get("data_summary"),
        "mesh": info.get("mesh"),
        "versions": info.get("versions"),
        "config": info.get("config"),
    }


def _epochs(lane: Mapping[str, Any]) -> list[int]:
    """Return the epochs in which a lane stands, one for each of its sources."""
    return [place["epoch"] for place in lane.get("sources", [lane]) if "epoch" in place]


def _tokenizer(path: Path) -> dict[str, Any] | None:
    from torchtitan.data.chat_template import read_chat_template
    from torchtitan.data.tokenizers import build_tokenizer
    from torchtitan.training.pretrained_config import tokenizer_of

    try:
        where = tokenizer_of(path)
        if where is None:
            return None
        found: dict[str, Any] = {"path": where, "tokens": build_tokenizer(where).vocab_size}
    except ConfigError as error:
        return {"problem": str(error)}
    try:
        read_chat_template([Path(where)])
    except ConfigError:
        return found | {"chat_template": False}
    return found | {"chat_template": True}


def _measured(contents: Contents, total: int) -> dict[str, dict[str, Any]]:
    from torchtitan.checkpoint.contents import TensorStats

    stats = {name: TensorStats() for name in contents.tensors}
    progress = Progress(f"reading {contents.path}", total)
    try:
        for name, piece in contents.pieces(list(stats)):
            stats[name].add(piece)
            progress.add(piece.nbytes)
    except Exception as error:
        raise _damage(error) from error
    return {name: vars(values) for name, values in stats.items()}


def _damage(error: Exception) -> Exception:
    from torchtitan.checkpoint.manifest import InvalidCheckpoint
    from torchtitan.weights.recognise import InvalidWeights

    is_damage = isinstance(error, InvalidCheckpoint | InvalidWeights)
    return CheckpointError(str(error)) if is_damage else error


def _summary_lines(report: Mapping[str, Any]) -> list[str]:
    tensors, dtypes = report["tensors"], ", ".join(report["dtypes"])
    size = format_bytes(report["bytes"])
    lines = [f"{report['path']}: {_KINDS[report['kind']]}"]
    count = f"{report['parameters']:,} parameters in {plural(len(tensors), 'tensor')}"
    lines.append(f"  model      {report['family'] or 'unknown'}, {count}, {dtypes}, {size}")
    given = {k: v for k, v in (report["hyper_parameters"] or {}).items() if v is not None}
    if given:
        lines.append("  sizes      " + ", ".join(f"{k} = {v}" for k, v in given.items()))
    if "step" in report:
        lines += _run_lines(report)
    lines.append(f"  tokenizer  {_tokenizer_text(report['tokenizer'])}")
    lines += [f"  notice     {notice}" for notice in report["notices"]]
    rows = [("tensor", "dtype", "shape", "norm", "largest")]
    for name, entry in tensors.items():
        values = [f"{entry[key]:.4g}" if key in entry else "" for key in ("norm", "largest")]
        if entry.get("non_finite"):
            values[1] += f", {entry['non_finite']:,} not finite"
        rows.append((name, entry["dtype"], _shape(entry), *values))
    return [*lines, "", *aligned(rows)]


def _run_lines(report: Mapping[str, Any]) -> list[str]:
    config, optimizer = report["config"] or {}, report["optimizer"]
    planned = config.get("training", {}).get("steps")
    state = ", its last" if report["finished"] else f" of {planned} planned" if planned else ""
    degrees = [f"{axis} {n}" for axis, n in (report["mesh"] or {}).items() if n != 1]
    mesh = " x ".join(degrees) or "one process"
    versions = ", ".join(f"{name} {text}" for name, text in (report["versions"] or {}).items())
    epochs = [str(epoch) for epoch in report["epochs"]]
    where = f", in epoch {epochs[0]}" if len(epochs) == 1 else ""
    where = f", in epochs {epochs[0]} to {epochs[-1]}" if len(epochs) > 1 else where
    tokens = "unknown" if report["tokens_seen"] is None else f"{report['tokens_seen']:,}"
    lines = [
        f"  run        step {report['step']}{state}; run {report['run_id']}; saved on {mesh}",
        f"  versions   {versions}",
        f"  data       {tokens} tokens seen; {plural(report['lanes'], 'lane')}{where}",
    ]
    size = format_bytes(optimizer["bytes"])
    text = f"{plural(optimizer['tensors'], 'tensor')}, {size}" if optimizer["tensors"] else "none"
    lines.append(f"  optimizer  {text}")
    changed = _changed_settings(config)
    return lines + [f"  setting    {key} = {json.dumps(changed[key])}" for key in sorted(changed)]


def _changed_settings(config: Mapping[str, Any]) -> dict[str, Any]:
    """Return the settings that are not the defaults; hyper-parameters have a line of their own."""
    from torchtitan.checkpoint.config_diff import flatten
    from torchtitan.config import JobConfig

    defaults = flatten(json.loads(JobConfig().model_dump_json()))
    return {
        key: value
        for key, value in flatten(config).items()
        if not key.startswith("model.args.") and defaults.get(key) != value
    }


def _tokenizer_text(found: Mapping[str, Any] | None) -> str:
    if found is None:
        return "none"
    if "problem" in found:
        return str(found["problem"])
    template = ", with a chat template" if found["chat_template"] else ""
    return f"{found['tokens']:,} tokens{template}, {found['path']}"


def _comparison(pair: Sequence[Contents], headers: bool) -> dict[str, Any]:
    """Return how two checkpoints differ, as JSON values; each difference is a pair."""
    one, other = pair
    left, right = dict(one.tensors), dict(other.tensors)
    if one.optimizer and other.optimizer:  # if only one has it, there is nothing to compare
        left, right = {**left, **one.optimizer}, {**right, **other.optimizer}
    shared = [name for name in left if name in right]
    alike = [name for name in shared if left[name]["shape"] == right[name]["shape"]]
    report: dict[str, Any] = {
        "paths": [str(each.path) for each in pair],
        "kinds": [each.kind for each in pair],
        "hyper_parameters": _hyper_parameters(one, other),
        "config": _settings(one, other),
        "only_in_first": [name for name in left if name not in right],
        "only_in_second": [name for name in right if name not in left],
        "shapes": {n: [left[n]["shape"], right[n]["shape"]] for n in shared if n not in alike},
        "dtypes": {
            name: [left[name]["dtype"], right[name]["dtype"]]
            for name in shared
            if left[name]["dtype"] != right[name]["dtype"]
        },
        "compared": len(alike),
        "values": None if headers else _apart(one, other, alike),
        "optimizer_compared": bool(one.optimizer and other.optimizer),
    }
    keys = ("hyper_parameters", "only_in_first", "only_in_second", "shapes", "dtypes", "values")
    return report | {"identical": None if headers else not any(report[key] for key in keys)}


def _hyper_parameters(one: Contents, other: Contents) -> dict[str, Any]:
    from torchtitan.weights.description import differences

    if one.args is None or other.args is None:
        return {}
    found: dict[str, Any] = {k: list(v) for k, v in differences(one.args, other.args).items()}
    return found


def _settings(one: Contents, other: Contents) -> dict[str, Any]:
    """Return the settings of two runs that differ; empty unless both are steps of runs."""
    from torchtitan.checkpoint.config_diff import flatten

    manifests = [each.manifest for each in (one, other)]
    configs = [{} if m is None else m.info.get("config") or {} for m in manifests]
    if not all(configs):
        return {}
    left, right = map(flatten, configs)
    return {
        key: [left.get(key), right.get(key)]
        for key in sorted({*left, *right})
        if left.get(key) != right.get(key)
    }


def _apart(one: Contents, other: Contents, names: Sequence[str]) -> dict[str, float | None]:
    """Return the largest difference of each tensor whose values differ, the largest ones first.

    None stands for a difference that is not finite, which JSON has no number for.
    """
    from torchtitan.checkpoint.contents import largest_difference, num_bytes

    entries = {**one.tensors, **one.optimizer}
    progress = Progress("comparing", sum(num_bytes(entries[name]) for name in names))
    found = dict.fromkeys(names, 0.0)
    try:
        pieces = itertools.zip_longest(one.pieces(names), other.pieces(names))
        for (name, left), (same, right) in pieces:
            assert name == same and left.shape == right.shape
            found[name] = max(found[name], largest_difference(left, right))
            progress.add(left.nbytes)
    except Exception as error:
        raise _damage(error) from error
    ordered = sorted(names, key=lambda name: (name not in one.tensors, -found[name]))
    return {n: found[n] if math.isfinite(found[n]) else None for n in ordered if found[n]}


def _comparison_lines(report: Mapping[str, Any]) -> list[str]:
    lines = [f"{p}: {_KINDS[k]}" for p, k in zip(report["paths"], report["kinds"])]
    for title, key in (("hyper-parameters", "hyper_parameters"), ("settings", "config")):
        if found := report[key]:
            rows = [(title, "first", "second")]
            rows += [(name, *map(json.dumps, both)) for name, both in found.items()]
            lines += ["", *aligned(rows)]
    for key, which in (("only_in_first", "first"), ("only_in_second", "second")):
        lines += [f"only in the {which}: {name}" for name in report[key]]
    for key in ("shapes", "dtypes"):
        lines += [f"{name}: {key[:-1]} {a} and {b}" for name, (a, b) in report[key].items()]
    values, compared = report["values"], plural(report["compared"], "tensor")
    if values is None:
        return [*lines, "", f"{compared} of equal shape; their values were not read"]
    what = "" if report["optimizer_compared"] else " (optimizer state is not in both)"
    lines += ["", f"{compared} compared{what}, {len(values)} differ"]
    if values:
        lines += aligned([("tensor", "largest difference"), *_difference_rows(values)])
    return [*lines, "no difference was found"] if report["identical"] else lines


def _difference_rows(values: Mapping[str, float | None]) -> list[tuple[str, str]]:
    """Return rows for the weights that differ most, and one for each state of the optimizer."""
    states: dict[str, list[str]] = {}
    weights = []
    for name in values:  # the largest difference first
        if name.startswith(OPTIMIZER_PREFIX):
            states.setdefault(name.rpartition(".")[2], []).append(name)
        else:
            weights.append(name)

    def row(name: str, label: str) -> tuple[str, str]:
        apart = values[name]
        return label, "not finite" if apart is None else f"{apart:.4g}"

    rows = [row(name, name) for name in weights[:_ROWS]]
    if more := weights[_ROWS:]:
        rows.append(row(more[0], f"{plural(len(more), 'other')} (--json has all): at most"))
    return rows + [
        row(names[0], f"optimizer, {state} of {plural(len(names), 'tensor')}: at most")
        for state, names in states.items()
    ]


def _shape(entry: Mapping[str, Any]) -> str:
    return " x ".join(map(str, entry["shape"])) or "a number"
