"""Fetching a step's data ahead, while the ranks agree whether that step will be trained."""

from collections.abc import Callable
from dataclasses import dataclass
from typing import Protocol

from torchtitan.config import DataError
from torchtitan.data.loader import StepData
from torchtitan.distributed.context import DistributedContext
from torchtitan.distributed.step_sync import PendingStepInfo, StepInfo, start_step_sync
from torchtitan.parallel.runner import Loss
from torchtitan.utils.signals import StopRequest

_MAX_EMPTY_STEPS = 1000


class Steps(Protocol):
    """Where the data come from: the loader, or a pass over a validation set."""

    def next_step(self) -> StepData:
        """The data of the next step, for ever. May raise."""


@dataclass(frozen=True)
class _Fetched:
    """This rank's data of the step to come, and the exchange about it."""

    data: StepData | None
    error: Exception | None
    pending: PendingStepInfo


class Prefetch:
    """Reads one step ahead. All ranks call every method, in the same order."""

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
        """`save_failed` is asked, once a step, whether a checkpoint could not be written.

        `max_bad_rows`: how many rows all ranks together may have left out. Counted here and not by
        rank, so that the mesh has no say in where a run stops.
        """
        self._loader = loader
        self._loss = loss
        self._world = world
        self._stop = stop
        self._counts_data = is_data_leader
        self._save_failed = save_failed
        self._max_bad_rows = max_bad_rows
        self._fetched: _Fetched | None = None

    def start(self) -> None:
        """Read the next step's microbatches, and tell the other ranks about them.

        A rank that cannot read says so before it fails, so that no other waits for it in vain.
        """
        data, error, num_targets, num_tokens = None, None, 0, 0
        try:
            data = self._loader.next_step()
            num_targets = sum(int(self._loss.count(batch)) for batch in data.microbatches)
            num_tokens = sum(batch.num_tokens for batch in data.microbatches)
        except Exception as failure:
            error = failure
        pending = start_step_sync(
            self._world,
            num_targets=num_targets,
            num_tokens=num_tokens,
            ended=data is not None and data.ended,
            stop=self._stop.requested,
            failed=error is not None,
            is_data_leader=self._counts_data,
            save_failed=self._save_failed(),
            bad_rows=0 if data is None else data.bad_rows,
        )
        self._fetched = _Fetched(data, error, pending)

    def wait(self) -> tuple[StepData, StepInfo]:
        """The data that were started, and what all ranks know about them.

        A step in which no rank has a target (all its documents are one token long, say) is left
        out. Raises DataError on all ranks when any could not read its data, or when they have left
        out too many rows.
        """
        for _ in range(_MAX_EMPTY_STEPS):
            data, agreed = self._wait_once()
            if agreed.num_targets or agreed.ended or agreed.stop:
                return data, agreed
            self.start()
        raise DataError(
            f"{_MAX_EMPTY_STEPS} steps in a row hold no target: nothing in the data can be"
            " predicted, as with documents of one token under training.document_mask"
        )

    def _wait_once(self) -> tuple[StepData, StepInfo]:
        fetched, self._fetched = self._fetched, None
        assert fetched is not None, "start() comes first"
        agreed = fetched.pending.wait()
        if fetched.error is not None:
            raise fetched.error
        if agreed.num_failed:
            who = "several ranks" if agreed.failed_rank is None else f"rank {agreed.failed_rank}"
            raise DataError(f"{who} could not read the data; the log there says why")
        if self._max_bad_rows is not None and agreed.bad_rows > self._max_bad_rows:
            raise DataError(
                f"left out {agreed.bad_rows} rows that cannot be read, more than"
                f" data.max_bad_rows = {self._max_bad_rows}; the logs of the ranks name them"
            )
        assert fetched.data is not None
        return fetched.data, agreed
