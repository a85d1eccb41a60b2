"""Sinks of metric records: JSON lines, and those registered by name. No torch.

A sink takes one record per logged step, validation set and evaluated task. It may raise at any of
them (disk full, folder gone); `MetricsLogger` decides what happens then. TensorBoard and
wandb have modules of their own.

A third party adds one by the decorator `register_sink`, in a module that `job.custom_import` names,
or by an entry point of the group `torchtitan.sinks`. Either gives a class that is made by
`(settings, run)`, a `SinkRun`, and is a `Sink`; its `Settings`, a `Section`, is the model of
`[sinks.NAME]`. It is opened on the ranks that write.
"""

import json
import logging
import math
import os
import shutil
from collections.abc import Callable, Mapping
from dataclasses import dataclass
from pathlib import Path
from typing import Any, Protocol, TypeVar

from torchtitan.config.registry import Registry, require_word, settings_of, validated
from torchtitan.config.schema import Section
from torchtitan.metrics.goodput import SHARE_PREFIX
from torchtitan.utils.files import replace_file, sync_folder
from torchtitan.utils.text import some_of

logger = logging.getLogger(__name__)

C = TypeVar("C", bound=type)
_REQUIRED = ("resume", "write", "flush", "close")
Record = dict[str, Any]

TENSORBOARD_TAGS = {
    "num_tokens_seen": "ntokens_seen",
    "tokens_per_second": "throughput/tps_per_device",
    "tflops": "throughput/tflops_per_device",
    "mfu": "mfu(%)",
    "mfu_causal": "mfu_causal(%)",
    "step_seconds": "time_metrics/end_to_end(s)",
    "data_seconds": "time_metrics/data_loading(s)",
    "checkpoint_seconds": "time_metrics/checkpoint(s)",
    "validation_seconds": "time_metrics/validation(s)",
    "evaluation_seconds": "time_metrics/evaluation(s)",
    "data_fraction": "time_metrics/data_loading(%)",
    "memory_active_gib": "memory/max_active(GiB)",
    "memory_active_fraction": "memory/max_active(%)",
    "memory_peak_gib": "memory/max_reserved(GiB)",
    "memory_peak_fraction": "memory/max_reserved(%)",
    "num_alloc_retries": "memory/num_alloc_retries",
    "num_ooms": "memory/num_ooms",
}
"""Tags by record key: TorchTitan's, but for the throughput, which is that of a device. Tags in %
show the record's fraction times 100. Other keys keep their name, and shares of time also get a %.
"""


def tagged(record: Record) -> dict[str, Any]:
    """Return the known values of a record as TensorBoard and wandb show them, by tag."""
    values = {}
    for key, value in record.items():
        if key == "step" or value is None:
            continue
        tag = TENSORBOARD_TAGS.get(key, key + "(%)" * key.startswith(SHARE_PREFIX))
        values[tag] = value * 100 if tag.endswith("(%)") else value
    return values


class Sink(Protocol):
    """A place for records. Every method may raise."""

    name: str
    """The name in warnings."""

    keeps_trying: bool
    """After a failure: True to go on writing, False to close it for the rest of the run."""

    def resume(self, step: int) -> None:
        """Forget what was written for steps after `step`. Called before the first write."""

    def write(self, record: Record) -> None:
        """Take a record; `record["step"]` never falls.

        A validation record has no `loss`, but `validation/NAME/loss` and more under that name, or
        `validation/loss` for the only set; that of a task has `evaluation/TASK/METRIC`.
        """

    def flush(self) -> None:
        """Return when everything written survives a failure of the machine."""

    def close(self, failed: bool = False) -> None:
        """Write what is left. `failed`: an error ended the run or the sink. The last call."""


@dataclass(frozen=True)
class SinkRun:
    """The run that a sink is opened for."""

    folder: Path
    """The run folder."""
    run_id: str
    """The same after a resume."""
    config: Mapping[str, Any]
    """All settings, by section."""
    rank: int | None
    """None unless every rank writes."""


@dataclass(frozen=True)
class SinkEntry:
    """A sink: its settings model, and a function that imports and returns its class."""

    settings: type[Section]
    load: Callable[[], Callable[[Any, SinkRun], Sink]]


def entry_of(name: str, thing: Any) -> SinkEntry:
    """Return the entry of what is registered under `name`. Raises TypeError if it is no sink."""
    require_word(name)
    if isinstance(thing, SinkEntry):
        return thing
    if not isinstance(thing, type):
        raise TypeError(f"the sink {name} is neither a class nor a SinkEntry")
    missing = [method for method in _REQUIRED if not callable(getattr(thing, method, None))]
    missing += [key for key in ("name", "keeps_trying") if not hasattr(thing, key)]
    if missing:
        raise TypeError(f"the sink {name} lacks {', '.join(missing)}")
    settings = settings_of(thing, f"the sink {name}")
    return SinkEntry(settings, lambda: thing)


SINKS: Registry[SinkEntry] = Registry("metrics.sinks", "torchtitan.sinks", entry_of)


def register_sink(name: str) -> Callable[[C], C]:
    """Decorate a class to make it available as the sink `name`.

    Raises ValueError for a taken name, TypeError for a class that is not a sink.
    """
    return SINKS.decorator(name)


def sink_settings(tables: Mapping[str, Any], name: str) -> Any:
    """Return the checked settings of the sink `name`, given the `[sinks]` tables.

    Raises ConfigError naming each unknown or invalid setting.
    """
    return validated(SINKS[name].settings, tables.get(name, {}), f"sinks.{name}")


def sink_opener(tables: Mapping[str, Any], name: str, run: SinkRun) -> Callable[[], Sink]:
    """Return a function that imports and opens the sink."""
    return lambda: SINKS[name].load()(sink_settings(tables, name), run)


class JsonLinesSink:
    """`metrics.jsonl`, the ground truth: one object a line, floats in full, non-finite ones null.

    Each record is one unbuffered write, so lines are whole whenever the process dies; a line that
    reached the disk only in part is removed again.
    """

    name = "metrics.jsonl"
    keeps_trying = True

    def __init__(self, path: Path):
        self._path = path
        path.parent.mkdir(exist_ok=True)
        self._open()

    def resume(self, step: int) -> None:
        """Remove records of later steps, and damaged lines, from the file."""
        content = self._path.read_bytes()
        lines = content.splitlines(True)
        steps = [_step_of(line) for line in lines]
        kept = b"".join(line for line, at in zip(lines, steps) if at is not None and at <= step)
        damaged = [number for number, at in enumerate(steps, 1) if at is None]
        if damaged and not content.endswith(b"\n"):
            damaged.pop()  # a process died while it wrote the last line
        if damaged:
            self._keep_aside(damaged)
        elif content.startswith(kept):  # steps never fall: only somebody's edit is otherwise
            self._file.truncate(len(kept))  # needs no space, so a full disk leaves no step twice
            self._length = len(kept)
            self.flush()
            return
        # By a rename: a crash here leaves the old file or the new one, not half of it.
        with replace_file(self._path) as file:
            file.write(kept)
        self._file.close()
        self._open()

    def write(self, record: Record) -> None:
        """Append the record as a line."""
        values = {key: _finite_or_none(value) for key, value in record.items()}
        line = (json.dumps(values, allow_nan=False) + "\n").encode()
        try:
            if self._file.write(line) != len(line):
                raise OSError("the disk took only a part of the line")
        except OSError:
            self._file.truncate(self._length)
            raise
        self._length += len(line)

    def flush(self) -> None:
        """Sync the file to the disk."""
        os.fsync(self._file.fileno())

    def close(self, failed: bool = False) -> None:
        """Close the file."""
        self._file.close()

    def _keep_aside(self, damaged: list[int]) -> None:
        """Copy the file before damaged lines, given by their numbers, are removed from it."""
        number = 1
        while (aside := Path(f"{self._path}.damaged-{number}")).exists():
            number += 1
        shutil.copyfile(self._path, aside)
        logger.warning(
            "%s: line %s cannot be read and is removed, so the curve may have a gap; the old file"
            " is kept as %s",
            self._path,
            some_of(list(map(str, damaged))),
            aside.name,
        )

    def _open(self) -> None:
        self._file = open(self._path, "ab", buffering=0)  # noqa: SIM115 - closed in close()
        self._length = self._file.seek(0, os.SEEK_END)
        # The name must survive a failure of the machine as well as the lines.
        sync_folder(self._path.parent)


def _step_of(line: bytes) -> int | None:
    """Return the step of a complete record; None for anything else."""
    try:
        step = json.loads(line)["step"] if line.endswith(b"\n") else None
    except (ValueError, KeyError, TypeError, RecursionError):
        return None
    return step if isinstance(step, int) else None


def _finite_or_none(value: Any) -> Any:
    return None if isinstance(value, float) and not math.isfinite(value) else value
