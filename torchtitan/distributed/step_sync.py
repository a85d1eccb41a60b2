"""The control exchange: ranks agree once a step, and no host waits for its device.

While the device works on a step, the host fetches the next one's data and starts one small sum of
integers over gloo: how many targets the data hold, whether anything is left, whether somebody was
asked to stop, failed, or could not write a checkpoint, and how many rows were left out. Its result
is read when the next step begins. So all ranks take every decision at the same step, and the number
of targets, by which the loss is divided, is known before the forward.
"""

from dataclasses import dataclass

import torch
import torch.distributed as dist

from torchtitan.distributed.context import DistributedContext


@dataclass(frozen=True)
class StepInfo:
    """The facts about the next step that all ranks agree on."""

    num_targets: int
    num_tokens: int
    ended: bool
    """No rank has data left."""
    stop: bool
    """Some rank was asked to stop."""
    num_failed: int
    """Ranks that could not read their data."""
    save_failed: bool = False
    """A checkpoint that was written in the background was not saved."""
    bad_rows: int = 0
    """Rows that all lanes have left out since the start of the run."""
    row_counts: tuple[int, ...] = ()
    """Further counts of rows, of all lanes since the start of the run."""


class PendingStepInfo:
    """A control exchange under way."""

    def __init__(self, values: torch.Tensor, work: dist.Work):
        self._values = values
        self._work = work

    def wait(self) -> StepInfo:
        """Return the facts as soon as all ranks have sent theirs."""
        self._work.wait()
        values = self._values.tolist()
        targets, tokens, with_data, stopping, failed, unsaved, bad_rows, *counts = values
        return StepInfo(
            num_targets=targets,
            num_tokens=tokens,
            ended=with_data == 0,
            stop=stopping > 0,
            num_failed=failed,
            save_failed=unsaved > 0,
            bad_rows=bad_rows,
            row_counts=tuple(counts),
        )


def start_step_sync(
    world: DistributedContext,
    *,
    num_targets: int,
    num_tokens: int,
    ended: bool,
    stop: bool,
    failed: bool,
    is_data_leader: bool,
    save_failed: bool = False,
    bad_rows: int = 0,
    row_counts: tuple[int, ...] = (),
) -> PendingStepInfo:
    """Send this rank's facts; every rank must call it once a step.

    `is_data_leader`: this rank's data are counted. One of the ranks that read the same data does.
    """
    world.watchdog.sign()
    values = torch.tensor(
        [
            num_targets if is_data_leader else 0,
            num_tokens if is_data_leader else 0,
            0 if ended else 1,
            1 if stop else 0,
            1 if failed else 0,
            1 if save_failed else 0,
            bad_rows if is_data_leader else 0,
            *(count if is_data_leader else 0 for count in row_counts),
        ]
    )
    work = dist.all_reduce(values, group=world.control_group, async_op=True)
    assert work is not None
    return PendingStepInfo(values, work)
