"""Validation: the loss of the model on sets that it is not trained on.

The loss of a set is the sum of the cross entropies of all its targets divided by their number, as
in a training step; the perplexity is its exponential. Batches are fetched one ahead, and all ranks
agree about each of them as about a step: whether any rank has data left, was asked to stop, or
could not read. Nothing that training depends on changes.
"""

import logging
import time
from collections.abc import Callable, Sequence
from contextlib import closing

import torch

from torchtitan.config.schema import Comm, Validation
from torchtitan.data.validation_reader import Pass, SetReader
from torchtitan.distributed.context import DistributedContext, timeout
from torchtitan.metrics.logger import MetricsLogger
from torchtitan.parallel.runner import Runner
from torchtitan.training.prefetch import Prefetch
from torchtitan.utils.garbage import GarbageCollection

logger = logging.getLogger(__name__)

_SECONDS_BETWEEN_LINES = 30


class Validator:
    """Evaluates the model on all sets. All ranks call every method, in the same order."""

    def __init__(
        self,
        section: Validation,
        comm: Comm,
        sets: Sequence[SetReader],
        fetch_ahead: Callable[[Pass], Prefetch],
        runner: Runner,
        world: DistributedContext,
        garbage: GarbageCollection,
    ):
        self._freq = section.freq
        self._comm = comm
        self._sets = sets
        self._fetch_ahead = fetch_ahead
        self._runner = runner
        self._world = world
        self._garbage = garbage
        self._last_step: int | None = None

    def is_due(self, step: int, last: bool = False) -> bool:
        """Return True if the model has to be evaluated after `step`; `last`: no step follows."""
        due = last or step % self._freq == 0
        return bool(self._sets) and due and step != self._last_step

    def run(self, step: int, metrics: MetricsLogger) -> None:
        """Evaluate after `step` and log it, unless a rank is asked to stop. Raises DataError."""
        self._last_step = step
        comm = self._comm
        # Files are opened again, and the first forward compiles: wait longer than for a step.
        patience = timeout(self._world, comm.init_timeout_seconds, comm.train_timeout_seconds)
        with metrics.timing("validation"), patience:
            for data in self._sets:
                if not self._evaluate(data, step, metrics):
                    logger.info("Asked to stop: left the validation after step %d", step)
                    return

    def _evaluate(self, data: SetReader, step: int, metrics: MetricsLogger) -> bool:
        """Evaluate one set; return False if a rank was asked to stop."""
        total = torch.zeros((), dtype=torch.float64, device=self._world.device)
        terms = dict.fromkeys(getattr(self._runner.evaluation_loss, "terms", ()), total)
        num_targets = num_batches = 0
        logged = time.monotonic()
        with closing(data.start()) as steps:
            ahead = self._fetch_ahead(steps)
            ahead.start()
            while True:
                batch, agreed = ahead.wait()
                if agreed.stop:
                    return False
                if agreed.ended:
                    break
                total = total + self._runner.evaluate(batch.microbatches)
                for name, value in self._runner.evaluated_terms.items():
                    terms[name] = terms[name] + value
                ahead.start()  # while the device is still at work
                num_targets += agreed.num_targets
                num_batches += 1
                self._garbage.step(num_batches, "validation batch")
                if time.monotonic() - logged > _SECONDS_BETWEEN_LINES:
                    logged = time.monotonic()
                    logger.info(
                        "Validating on %s: %s targets so far", data.name, f"{num_targets:,}"
                    )
        if num_targets == 0:
            logger.warning("Validation set %s has no targets", data.name)
        else:
            has_perplexity = getattr(self._runner.evaluation_loss, "has_perplexity", True)
            loss = total / num_targets
            means = {name: value / num_targets for name, value in terms.items()}
            metrics.log_validation(step, data.name, loss, num_targets, has_perplexity, means)
        return True
