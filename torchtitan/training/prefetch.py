"""Prefetching of a step's data, while the ranks agree whether to train that step."""

import math
import time
from collections import deque
from collections.abc import Callable
from dataclasses import dataclass
from typing import Protocol

from torchtitan.config import DataError
from torchtitan.data.loader import StepData
from torchtitan.data.packing import COUNTS
from torchtitan.distributed.context import DistributedContext
from torchtitan.distributed.step_sync import PendingStepInfo, StepInfo, start_step_sync
from torchtitan.parallel.runner import Loss
from torchtitan.utils.processes import StopRequest
from torchtitan.utils.torch_compat import group_timeout

_MAX_EMPTY_STEPS = 1000
_MOST_REASON = 1000
"""Characters of a rank's reason that others are sent."""
_MOST_REASONS = 3
_PATIENCE = 0.8
"""Share of the time for which other ranks wait, after which a rank gives up a read and says so."""


class Steps(Protocol):
    """A source of steps: the loader, or a pass over a validation set."""

    def next_step(self, patience: float) -> StepData:
        """Return the data of the next step. May raise, if no row comes for `patience` seconds."""


@dataclass(frozen=True)
class _Fetched:
    """A rank's data of the next step, and the exchange about it."""

    data: StepData | None
    error: Exception | None
    pending: PendingStepInfo


class Prefetch:
    """Reader of one step ahead. All ranks call every method, in the same order."""

    def __init__(
        self,
        loader: Steps,
        loss: Loss,
        world: DistributedContext,
        stop: StopRequest,
        is_data_leader: bool,
        save_failed: Callable[[], bool] = lambda: False,
        max_bad_rows: int | None = None,
    ):
        """`save_failed` returns True if a checkpoint could not be written.

        `max_bad_rows`: how many rows all ranks together may skip. They are counted together so that
        every mesh stops at the same step.
        """
        self._loader = loader
        self._loss = loss
        self._world = world
        self._stop = stop
        self._is_data_leader = is_data_leader
        self._save_failed = save_failed
        self._max_bad_rows = max_bad_rows
        self._fetched: _Fetched | None = None
        self._started: deque[float] = deque(maxlen=3)

    def start(self) -> None:
        """Read the next step's microbatches, and start the exchange about them.

        A rank that cannot read reports it before it fails, so that the others do not wait for it.
        """
        self._time_step()
        data, error, num_targets, num_tokens = None, None, 0, 0
        try:
            data = self._loader.next_step(_patience(self._world))
            num_targets = sum(int(self._loss.count(batch)) for batch in data.microbatches)
            num_tokens = sum(batch.num_tokens for batch in data.microbatches)
        except Exception as failure:
            error = failure
        pending = start_step_sync(
            self._world,
            num_targets=num_targets,
            num_tokens=num_tokens,
            ended=data is not None and data.ended,
            stop=self._stop.poll(),
            failed=error is not None,
            is_data_leader=self._is_data_leader,
            save_failed=self._save_failed(),
            bad_rows=0 if data is None else data.bad_rows,
            row_counts=(0,) * len(COUNTS) if data is None else data.counts,
        )
        self._fetched = _Fetched(data, error, pending)

    def _time_step(self) -> None:
        """Time the shorter one of the last two steps: a save may have followed one of them."""
        self._started.append(time.monotonic())
        if len(self._started) == 3:
            first, second, third = self._started
            self._stop.step_seconds = min(second - first, third - second)

    def wait(self) -> tuple[StepData, StepInfo]:
        """Return the data of the started step, and what all ranks know about it.

        A step in which no rank has a target (its documents are one token long, say) is skipped.
        Raises DataError on all ranks if any could not read its data, or if they skipped too many
        rows.
        """
        for _ in range(_MAX_EMPTY_STEPS):
            data, agreed = self._wait_once()
            if agreed.num_targets or agreed.ended or agreed.stop:
                return data, agreed
            self.start()
        raise DataError(
            f"{_MAX_EMPTY_STEPS} steps in a row have no targets: the data have nothing to predict,"
            " for example documents of one token under training.document_mask"
        )

    def _wait_once(self) -> tuple[StepData, StepInfo]:
        fetched, self._fetched = self._fetched, None
        assert fetched is not None, "start() comes first"
        agreed = fetched.pending.wait()
        if agreed.num_failed:
            reason = None if fetched.error is None else str(fetched.error)[:_MOST_REASON]
            reasons = list(enumerate(self._world.gather_json(reason)))  # all ranks hear of it
            if fetched.error is not None:
                raise fetched.error
            failed = [f"rank {rank}: {text}" for rank, text in reasons if text is not None]
            raise DataError("; ".join(failed[:_MOST_REASONS]))
        if self._max_bad_rows is not None and agreed.bad_rows > self._max_bad_rows:
            raise DataError(
                f"left out {agreed.bad_rows} rows that cannot be read, more than"
                f" data.max_bad_rows = {self._max_bad_rows}; the logs of the ranks name them"
            )
        assert fetched.data is not None
        return fetched.data, agreed


def _patience(world: DistributedContext) -> float:
    """Return how long a read may stand still: for ever, where no other rank waits."""
    if world.world_size == 1:
        return math.inf
    return _PATIENCE * group_timeout(world.control_group)


def row_counts(agreed: StepInfo) -> dict[str, int]:
    """Return the rows that all ranks have changed or left out so far, by the names of metrics."""
    names = (f"rows_{name}" for name in COUNTS)
    return {"bad_rows": agreed.bad_rows, **dict(zip(names, agreed.row_counts))}
