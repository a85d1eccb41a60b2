"""Validation: the loss of the model as it is on sets that are not trained on.

The loss of a set is the sum of the cross entropies of all its targets divided by their number, as
that of a step is, and the perplexity its exponential. Batches are fetched one ahead, and all ranks
agree about each of them as they do about a step: whether any rank has data left, was asked to stop,
or could not read. Nothing that training depends on is changed.
"""

import logging
import time
from collections.abc import Callable, Sequence
from contextlib import closing
from typing import Any, Protocol

import torch

from torchtitan.config.schema import Comm, Validation
from torchtitan.distributed.context import DistributedContext, timeout
from torchtitan.distributed.step_sync import StepInfo
from torchtitan.metrics.logger import MetricsLogger
from torchtitan.parallel.runner import Runner
from torchtitan.utils.garbage import GarbageCollection

logger = logging.getLogger(__name__)

_SECONDS_BETWEEN_LINES = 30


class ValidationSet(Protocol):
    """A set as this rank reads it."""

    name: str

    def start(self) -> Any:
        """A pass over it, to be closed."""


class Ahead(Protocol):
    """The batches of a pass, fetched one ahead; `prefetch.Prefetch` is one."""

    def start(self) -> None:
        """Fetch the next batch."""

    def wait(self) -> tuple[Any, StepInfo]:
        """The batch (its `microbatches`), and what all ranks know about it."""


class Validator:
    """Evaluates the model on all sets. All ranks call every method, in the same order."""

    def __init__(
        self,
        section: Validation,
        comm: Comm,
        sets: Sequence[ValidationSet],
        fetch_ahead: Callable[[Any], Ahead],
        runner: Runner,
        metrics: MetricsLogger,
        world: DistributedContext,
        garbage: GarbageCollection,
    ):
        self._freq = section.freq
        self._comm = comm
        self._sets = sets
        self._fetch_ahead = fetch_ahead
        self._runner = runner
        self._metrics = metrics
        self._world = world
        self._garbage = garbage
        self._last_step: int | None = None

    def is_due(self, step: int, last: bool = False) -> bool:
        """Whether the model is to be evaluated after `step`, and was not yet; `last`: no other
        follows."""
        due = last or step % self._freq == 0
        return bool(self._sets) and due and step != self._last_step

    def run(self, step: int) -> None:
        """Evaluate after `step` and log it, unless a rank is asked to stop. Raises DataError."""
        self._last_step = step
        comm = self._comm
        # A set's files are opened anew, and the first forward compiles: more patience than usual.
        patience = timeout(self._world, comm.init_timeout_seconds, comm.train_timeout_seconds)
        with self._metrics.timing("validation"), patience:
            for data in self._sets:
                if not self._evaluate(data, step):
                    logger.info("Asked to stop: gave up the validation after step %d", step)
                    return

    def _evaluate(self, data: ValidationSet, step: int) -> bool:
        """Whether the pass came to its end."""
        total = torch.zeros((), dtype=torch.float64, device=self._world.device)
        num_targets = num_batches = 0
        said = time.monotonic()
        with closing(data.start()) as steps:
            ahead = self._fetch_ahead(steps)
            ahead.start()
            while True:
                batch, agreed = ahead.wait()
                if agreed.stop:
                    return False
                if agreed.ended:
                    break
                total += self._runner.evaluate(batch.microbatches)
                ahead.start()  # while the device is still at work
                num_targets += agreed.num_targets
                num_batches += 1
                self._garbage.validation_batch(num_batches)
                if time.monotonic() - said > _SECONDS_BETWEEN_LINES:
                    said = time.monotonic()
                    logger.info(
                        "Validating on %s: %s targets so far", data.name, f"{num_targets:,}"
                    )
        if num_targets == 0:
            logger.warning("Validation set %s has nothing to predict", data.name)
        else:
            self._metrics.log_validation(step, data.name, total / num_targets, num_targets)
        return True
