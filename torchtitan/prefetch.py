"""Fetching a step's data ahead, while the ranks agree whether that step will be trained."""

from dataclasses import dataclass

from torchtitan.config import DataError
from torchtitan.data.loader import Loader, StepData
from torchtitan.distributed.control import Agreement, PendingAgreement, start_exchange
from torchtitan.distributed.runner import Loss
from torchtitan.distributed.world import World


@dataclass(frozen=True)
class Fetched:
    """This rank's data of the step to come, and the exchange about it."""

    data: StepData | None
    error: DataError | None
    pending: PendingAgreement

    def wait(self) -> tuple[StepData, Agreement]:
        """Data and agreement. Raises DataError on all ranks when any could not read its data."""
        agreed = self.pending.wait()
        if self.error is not None:
            raise self.error
        if agreed.num_failed:
            who = "several ranks" if agreed.failed_rank is None else f"rank {agreed.failed_rank}"
            raise DataError(f"{who} could not read the data; the log there says why")
        assert self.data is not None
        return self.data, agreed


def fetch(loader: Loader, loss: Loss, world: World, *, stop: bool, counts_data: bool) -> Fetched:
    """Read the next step's microbatches and tell the other ranks about them. All ranks call it.

    `stop`: this rank was asked to. A rank that cannot read says so before it fails, so that no
    other waits for it in vain.
    """
    data, error, num_targets, num_tokens = None, None, 0, 0
    try:
        data = loader.next_step()
        num_targets = sum(int(loss.count(batch)) for batch in data.microbatches)
        num_tokens = sum(batch.num_tokens for batch in data.microbatches)
    except DataError as failure:
        error = failure
    pending = start_exchange(
        world,
        num_targets=num_targets,
        num_tokens=num_tokens,
        ended=data is not None and data.ended,
        stop=stop,
        failed=error is not None,
        counts_data=counts_data,
    )
    return Fetched(data, error, pending)
