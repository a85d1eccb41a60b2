"""The ledger: which rows of the data each step trained on.

A start of a run writes one file a rank, `ledger/step-S.rank-R.jsonl`, from the step S after which
it goes on: a line a step with the spans of every sequence of the rank's lanes. Lines reach the disk
before the checkpoint of their step commits. What a start wrote for steps that a later start trained
again does not count. No torch.
"""

import json
import logging
import os
import re
from collections.abc import Iterator, Mapping, Sequence
from contextlib import contextmanager
from dataclasses import dataclass, field
from pathlib import Path
from types import TracebackType
from typing import NamedTuple

from torchtitan.utils.files import sync_folder

logger = logging.getLogger(__name__)

LEDGER_FOLDER = "ledger"
"""Below the run folder."""

_NAME = re.compile(r"step-(\d+)\.rank-(\d+)\.jsonl")
_RANGE = re.compile(r"(\d+)(?:-(\d+))?")


class DocumentSpan(NamedTuple):
    """Consecutive tokens of one row of the data, in a sequence."""

    source: int
    """Number of the source in a mixture."""
    shard: int
    """Number among the source's shards."""
    place: int
    """`Row.place`."""
    start: int
    """Its first token in the row; with chat data, the number of the conversation's sample."""
    num_tokens: int


Lanes = Mapping[int, Sequence[Sequence[DocumentSpan]]]
"""By lane: the spans of each of its sequences in a step."""


@dataclass
class LedgerStep:
    """One step."""

    data_step: int
    """Number of the step in the data; see `StepData`."""
    lanes: dict[int, list[list[DocumentSpan]]] = field(default_factory=dict)
    """By lane, of all ranks: the spans of each sequence."""


class Ledger:
    """Writes the file of one rank. A context manager."""

    def __init__(self, run_folder: Path, step: int, rank: int, writes: bool):
        """Go on after `step`; without `writes` the methods do nothing."""
        self._folder = run_folder / LEDGER_FOLDER
        self._path = self._folder / f"step-{step}.rank-{rank}.jsonl"
        self._step = step
        self._writes = writes
        self._file: int | None = None

    def prepare(self) -> None:
        """Let what earlier starts wrote for later steps not count any more. Raises OSError.

        For rank 0, before any rank records a step.
        """
        if self._writes:
            self._folder.mkdir(exist_ok=True)
        for path, first, _ in _files(self._folder):
            if first >= self._step:
                path.unlink()
        if self._folder.is_dir():
            self._path.touch()  # the start counts, even if it records nothing

    def record(self, step: int, data_step: int, lanes: Lanes) -> None:
        """Note what `step` trains on. A failure is reported, and ends the ledger, not the run."""
        if not self._writes:
            return
        line = {"step": step, "data_step": data_step, "lanes": lanes}
        with self._reported():
            if self._file is None:
                self._file = os.open(self._path, os.O_WRONLY | os.O_CREAT | os.O_APPEND, 0o664)
                sync_folder(self._folder)
            left = memoryview((json.dumps(line, separators=(",", ":")) + "\n").encode())
            while left:  # a full disk takes a part without an error
                left = left[os.write(self._file, left) :]

    def flush(self) -> None:
        """Return when all lines are on the disk."""
        if self._file is not None:
            with self._reported():
                os.fsync(self._file)

    @contextmanager
    def _reported(self) -> Iterator[None]:
        try:
            yield
        except OSError as error:
            self._writes = False
            logger.warning("the ledger %s ends, training continues: %r", self._path, error)

    def __enter__(self) -> "Ledger":
        return self

    def __exit__(
        self,
        kind: type[BaseException] | None,
        error: BaseException | None,
        trace: TracebackType | None,
    ) -> None:
        if self._file is not None:
            os.close(self._file)
            self._file = None


def read_ledger(folder: Path) -> dict[int, LedgerStep]:
    """Return the steps in the ledger of the run in `folder`, by number, in order.

    A line that a killed process did not finish is left out. Raises OSError.
    """
    steps: dict[int, LedgerStep] = {}
    files = _files(folder / LEDGER_FOLDER)
    starts = sorted({first for _, first, _ in files})
    for path, first, _ in sorted(files, key=lambda file: file[1:]):
        later = next((start for start in starts if start > first), None)
        with path.open(encoding="utf-8") as lines:
            for line in lines:
                if not line.endswith("\n"):
                    break
                entry = json.loads(line)
                step = entry["step"]
                if later is None or step <= later:
                    found = steps.setdefault(step, LedgerStep(entry["data_step"]))
                    for lane, sequences in entry["lanes"].items():
                        found.lanes[int(lane)] = [
                            [DocumentSpan(*span) for span in spans] for spans in sequences
                        ]
    for found in steps.values():
        found.lanes = dict(sorted(found.lanes.items()))
    return dict(sorted(steps.items()))


def step_ranges(texts: Sequence[str]) -> tuple[range, ...]:
    """Return the steps that `data.skip` names: "7", or "1200-1300", both included.

    Raises ValueError for anything else.
    """
    ranges = []
    for text in texts:
        match = _RANGE.fullmatch(text.strip())
        first, last = (int(match[1]), int(match[2] or match[1])) if match else (0, 0)
        if not 1 <= first <= last:
            raise ValueError(f"{text!r} is not a step, or a range of steps such as 1200-1300")
        ranges.append(range(first, last + 1))
    return tuple(ranges)


def _files(folder: Path) -> list[tuple[Path, int, int]]:
    """Return path, step and rank of the ledger's files."""

    def found() -> Iterator[tuple[Path, int, int]]:
        for path in folder.iterdir() if folder.is_dir() else ():
            if match := _NAME.fullmatch(path.name):
                yield path, int(match[1]), int(match[2])

    return list(found())
