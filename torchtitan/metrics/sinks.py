"""Where records of metrics go: a file of JSON lines, TensorBoard (wandb has a module of its own).

A sink takes records, one a logged step and one a validation set, and may fail at any of them (disk
full, folder gone): it raises, and `MetricsLogger` decides what that means. Another place to log to
is another class with these methods.
"""

import json
import logging
import math
import os
import shutil
from pathlib import Path
from typing import Any, Protocol

from torchtitan.metrics.goodput import SHARE_PREFIX

logger = logging.getLogger(__name__)

_MAX_LISTED = 5
Record = dict[str, Any]

TENSORBOARD_TAGS = {
    "loss": "loss_metrics/global_avg_loss",
    "grad_norm": "grad_norm",
    "lr": "lr",
    "num_tokens_seen": "ntokens_seen",
    "tokens_per_second": "throughput(tps)",
    "tflops": "tflops",
    "mfu": "mfu(%)",
    "mfu_causal": "mfu_causal(%)",
    "step_seconds": "time_metrics/end_to_end(s)",
    "data_seconds": "time_metrics/data_loading(s)",
    "checkpoint_seconds": "time_metrics/checkpoint(s)",
    "validation_seconds": "time_metrics/validation(s)",
    "data_fraction": "time_metrics/data_loading(%)",
    "memory_active_gib": "memory/max_active(GiB)",
    "memory_active_fraction": "memory/max_active(%)",
    "memory_peak_gib": "memory/max_reserved(GiB)",
    "memory_peak_fraction": "memory/max_reserved(%)",
    "num_alloc_retries": "memory/num_alloc_retries",
    "num_ooms": "memory/num_ooms",
}
"""Record key -> TorchTitan's tag. Tags in % show the record's fraction times 100. Other keys keep
their name, but for the shares of time, which get a % too."""


def tagged(record: Record) -> dict[str, Any]:
    """The values of a record as TensorBoard and wandb show them, by tag; unknown ones left out."""
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
    """As a warning about it names it."""

    keeps_trying: bool
    """After a failure: go on writing (True), or give it up for this run, and close it."""

    def resume(self, step: int) -> None:
        """Before the first write: forget what was written for steps after `step`."""

    def write(self, record: Record) -> None:
        """Take a record; `record["step"]` never falls. That of a validation has no `loss`, but
        `validation/NAME/loss` and others of that name."""

    def flush(self) -> None:
        """Return when what was written survives the machine's failure."""

    def close(self, failed: bool = False) -> None:
        """Write what is left; `failed`: an error ends the run, or the sink. Nothing is called
        afterwards."""


class JsonLinesSink:
    """`metrics.jsonl`, the ground truth: an object a line, floats in full, what is not finite null.

    Each record is one unbuffered write, so lines are whole whenever the process dies; a line that
    the disk took only in part is cut off again.
    """

    name = "metrics.jsonl"
    keeps_trying = True

    def __init__(self, path: Path):
        self._path = path
        path.parent.mkdir(exist_ok=True)
        self._open()

    def resume(self, step: int) -> None:
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
        replacement = self._path.with_name(self._path.name + ".tmp")
        with open(replacement, "wb") as file:
            file.write(kept)
            file.flush()
            os.fsync(file.fileno())
        os.replace(replacement, self._path)
        self._file.close()
        self._open()

    def write(self, record: Record) -> None:
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
        os.fsync(self._file.fileno())

    def close(self, failed: bool = False) -> None:
        self._file.close()

    def _keep_aside(self, damaged: list[int]) -> None:
        """Copy the file before damaged lines, by their numbers, are left out of it."""
        number = 1
        while (aside := Path(f"{self._path}.damaged-{number}")).exists():
            number += 1
        shutil.copyfile(self._path, aside)
        shown = ", ".join(map(str, damaged[:_MAX_LISTED])) + ", ..." * (len(damaged) > _MAX_LISTED)
        logger.warning(
            "%s: line %s cannot be read and is left out, so the curve may have a gap; the old file"
            " is kept as %s",
            self._path,
            shown,
            aside.name,
        )

    def _open(self) -> None:
        self._file = open(self._path, "ab", buffering=0)  # noqa: SIM115 - closed in close()
        self._length = self._file.seek(0, os.SEEK_END)
        # The name must survive a failure of the machine as well as the lines.
        folder = os.open(self._path.parent, os.O_RDONLY)
        try:
            os.fsync(folder)
        finally:
            os.close(folder)


class TensorBoardSink:
    """TensorBoard event files under TorchTitan's tag names.

    One folder for the whole run: after a resume TensorBoard itself hides the steps that are trained
    anew, as the first event of the new file tells it from which step on.
    """

    name = "TensorBoard"
    keeps_trying = False

    def __init__(self, folder: Path):
        self._folder = folder
        self._purge_step: int | None = None
        self._writer: Any = None

    def resume(self, step: int) -> None:
        self._purge_step = step + 1

    def write(self, record: Record) -> None:
        if self._writer is None:
            from torch.utils.tensorboard import SummaryWriter  # takes a second to import

            self._writer = SummaryWriter(
                str(self._folder), max_queue=1000, purge_step=self._purge_step
            )
        for tag, value in tagged(record).items():
            self._writer.add_scalar(tag, value, record["step"])

    def flush(self) -> None:
        if self._writer is not None:
            self._writer.flush()

    def close(self, failed: bool = False) -> None:
        if self._writer is not None:
            self._writer.close()


def _step_of(line: bytes) -> int | None:
    """The step of a whole record; None for anything else."""
    try:
        step = json.loads(line)["step"] if line.endswith(b"\n") else None
    except (ValueError, KeyError, TypeError, RecursionError):
        return None
    return step if isinstance(step, int) else None


def _finite_or_none(value: Any) -> Any:
    return None if isinstance(value, float) and not math.isfinite(value) else value
