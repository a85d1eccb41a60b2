"""`torchtitan plot`: the curves of runs as a picture, from their records alone. No torch."""

import argparse
import math
import os
import sys
from collections.abc import Iterable, Sequence
from dataclasses import dataclass
from fnmatch import fnmatchcase
from importlib.util import find_spec
from pathlib import Path

import numpy as np
from numpy.typing import NDArray

from torchtitan.checkpoint.stored_run import METRICS_NAME
from torchtitan.config.errors import ConfigError, ConfigIssue
from torchtitan.config.exit_codes import DONE
from torchtitan.config.paths import expand_path
from torchtitan.config.suggest import did_you_mean
from torchtitan.metrics.records import read_records
from torchtitan.metrics.sinks import Record
from torchtitan.utils.text import format_bytes, plural, some_of

Floats = NDArray[np.float64]

_FORMATS = (".png", ".svg", ".pdf")
_POSITIONS = {"steps": "step", "tokens": "num_tokens_seen", "time": "run_seconds"}
_DEFAULTS = ("loss", "lr", "grad_norm", "tokens_per_second", "memory_peak_gib")
_LARGE_BYTES = 50 * 2**20
_MOST = 1e300
"""Larger values are unknown: an axis needs room for their difference."""


@dataclass(frozen=True)
class Curve:
    """One metric of a run."""

    x: Floats
    """Steps, tokens or seconds, `[points]`."""
    y: Floats
    """NaN where a record has no value, `[points]`."""
    steps: Floats
    """`[points]`."""


@dataclass(frozen=True)
class Curves:
    """The curves of a run by metric, and the name to show."""

    name: str
    by_metric: dict[str, Curve]


class _Wanted(dict[str, bool]):
    """Every key of the records so far, with True for those that `patterns` ask for."""

    def __init__(self, patterns: Sequence[str]):
        self._patterns = (*patterns, *_POSITIONS.values())
        super().__init__()

    def __missing__(self, key: str) -> bool:
        self[key] = any(_matches(key, pattern) for pattern in self._patterns)
        return self[key]


def run(options: argparse.Namespace) -> int:
    """Write the picture and name it."""
    if find_spec("matplotlib") is None:
        fix = "run `pip install -e '.[plot]' -c constraints.txt` in the clone"
        raise ConfigError(ConfigIssue("plot", "needs the package matplotlib", fix))
    files = list(dict.fromkeys(_records_file(word) for word in options.runs))
    names = run_names(files)
    output = _output(options.output, names)
    asked = [name.strip() for name in (options.metrics or "").split(",") if name.strip()]
    patterns = [*(asked or [*_DEFAULTS, "evaluation"]), "validation"]
    runs, keys = [], set[str]()
    for file, name in zip(files, names, strict=True):
        wanted = _Wanted(patterns)
        curves = _curves_of(_read(file, wanted), _POSITIONS[options.by], file)
        runs.append(Curves(name, curves))
        keys |= wanted.keys() - {"step"}
    metrics = chosen_metrics(asked, keys, {metric for one in runs for metric in one.by_metric})
    if not metrics:
        problem, fix = "has no value of the default metrics", "name some with --metrics"
        raise ConfigError(ConfigIssue("RUN", problem, fix, str(files[0])))

    from torchtitan.commands.plot_figure import Look, draw

    look = Look(options.by, options.smooth or 0.0, options.log, options.dark)
    try:
        draw(runs, metrics, look, output)
    except OSError as error:
        raise ConfigError(_unwritable(output, error.strerror or str(error))) from error
    print(f"Wrote {output}: {plural(len(metrics), 'chart')} of {plural(len(runs), 'run')}")
    return DONE


def run_names(files: Sequence[Path]) -> list[str]:
    """Return the names of the run folders, each with as many parents as make it unique."""
    parts = [
        file.parent.parts if file.name == METRICS_NAME else file.with_suffix("").parts
        for file in files
    ]
    names = []
    for mine in parts:
        depth = 1
        while depth < len(mine) and sum(one[-depth:] == mine[-depth:] for one in parts) > 1:
            depth += 1
        name = "/".join(mine[-depth:])
        names.append("".join(letter if letter.isprintable() else "?" for letter in name))
    return names


def chosen_metrics(asked: Sequence[str], keys: Iterable[str], known: Iterable[str]) -> list[str]:
    """Return the metrics to draw, one chart each, in order.

    `keys` are all keys of the records, and `known` those with a value. Without `asked`, they are
    the defaults of those known. Raises ConfigError for a name that has no value.
    """
    keys, known = sorted(keys), sorted(known)
    if not asked:
        sets = [key for key in known if fnmatchcase(key, "validation/*/loss")]
        tasks = [key for key in known if key.startswith("evaluation/") and "stderr" not in key]
        return [key for key in (*_DEFAULTS, "validation/loss") if key in known] + sets + tasks
    metrics: dict[str, None] = {}
    for name in asked:
        named = [name] if name in keys else [key for key in keys if _matches(key, name)]
        metrics |= dict.fromkeys(key for key in named if key in known)
        if not named:
            fix = did_you_mean(name, keys)
            raise ConfigError(ConfigIssue("--metrics", "is in no record", fix, name))
        if not any(key in known for key in named):
            problem = "is null in all records"
            raise ConfigError(ConfigIssue("--metrics", problem, "leave it out", name))
    return list(metrics)


def _matches(key: str, pattern: str) -> bool:
    return key == pattern or key.startswith(f"{pattern}/") or fnmatchcase(key, pattern)


def _records_file(word: str) -> Path:
    """Return the absolute path of the records that an argument names. Raises ConfigError."""
    path = Path(os.path.abspath(expand_path(word)))
    if path.is_file():
        return path
    file = path / METRICS_NAME
    if file.is_file():
        return file
    if path.is_dir():
        problem = f"has no {METRICS_NAME}, so either no step is logged yet or it is not a run"
    else:
        problem = "is neither a folder nor a file"
    inside = [os.path.join(word, one.parent.name) for one in path.glob(f"*/{METRICS_NAME}")]
    fix = f"name a run in it: {some_of(sorted(inside))}" if inside else "give a job.dump_folder"
    raise ConfigError(ConfigIssue("RUN", problem, fix, word))


def _output(text: str | None, names: Sequence[str]) -> Path:
    """Return the file to write. Raises ConfigError if it cannot be written."""
    if text is None:
        name = names[0].replace("/", "_") if len(names) == 1 else ""
        output = Path(f"plot_{name}.png" if name else "plot.png")
    else:
        output = Path(expand_path(text))
    if output.suffix.lower() not in _FORMATS:
        fix = "end it in .png, .svg or .pdf"
        raise ConfigError(ConfigIssue("--output", "has no format that is known", fix, str(output)))
    if not output.parent.is_dir():
        raise ConfigError(_unwritable(output, f"there is no folder {output.parent}"))
    if output.is_dir() or not os.access(output.parent, os.W_OK):
        raise ConfigError(_unwritable(output, "a folder" if output.is_dir() else "no permission"))
    return output


def _unwritable(output: Path, reason: str) -> ConfigIssue:
    fix = "name a file in a folder that you may write to"
    return ConfigIssue("--output", f"cannot be written ({reason})", fix, str(output))


def _read(file: Path, wanted: _Wanted) -> list[Record]:
    size = file.stat().st_size
    if size > _LARGE_BYTES:
        print(f"Reading {format_bytes(size)} of {file} ...", file=sys.stderr, flush=True)
    try:
        records = read_records(file, wanted.__getitem__)
    except OSError as error:
        problem = f"cannot be read: {error.strerror or error}"
        raise ConfigError(ConfigIssue("RUN", problem, "see its permissions", str(file))) from error
    if not records:
        problem, fix = "has no records yet", "wait until a step is logged"
        raise ConfigError(ConfigIssue("RUN", problem, fix, str(file)))
    return records


def _curves_of(records: Sequence[Record], position: str, file: Path) -> dict[str, Curve]:
    """Return the metrics that have a value somewhere.

    Records of validations have a step only; their tokens and time are those of that step.
    """
    columns: dict[str, tuple[list[float], list[float]]] = {}
    for record in records:
        for key, value in record.items():
            if key != "step":
                steps, values = columns.setdefault(key, ([], []))
                steps.append(record["step"])
                is_known = type(value) in (int, float) and abs(value) < _MOST
                values.append(value if is_known else math.nan)
    arrays = {key: (np.array(x, float), np.array(y, float)) for key, (x, y) in columns.items()}
    known = {key: (x, y) for key, (x, y) in arrays.items() if np.isfinite(y).any()}
    if position != "step":
        if position not in known:
            fix = "align by steps"
            raise ConfigError(ConfigIssue("--by", f"{file} has no {position}", fix))
        at, positions = known[position]
        has_one = np.isfinite(positions)
        at, positions = at[has_one], positions[has_one]
    return {
        key: Curve(x if position == "step" else np.interp(x, at, positions), y, x)
        for key, (x, y) in known.items()
    }
