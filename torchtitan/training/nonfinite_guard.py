"""Detecting a step that is not finite, without making the host wait for every step.

The device skips the update of such a step, so the host may learn of it late: on a GPU one step
later, when reading the flag no longer stalls the device, but before the next update. (A step in
the backward cannot be skipped: the weights are lost, but nothing is saved before the host knows.) A
skipped update does not mean that the weights are good, because an earlier one may have spoilt them;
so the error reports which are not finite.
"""

import logging
from collections import deque
from collections.abc import Callable

import torch
from torch import Tensor

from torchtitan.config import NonFiniteError
from torchtitan.training.nonfinite_origin import StepBatch

logger = logging.getLogger(__name__)


class NonFiniteGuard:
    """Stops at a step that was not finite, or counts it, at most `lag` steps late.

    The flags are the same on all ranks (they come from reduced values), and so is what follows.
    """

    def __init__(
        self,
        lag: int,
        left_out: bool = True,
        most_skipped: int = 0,
        find_non_finite: Callable[[], str] = lambda: "",
        find_origin: Callable[[StepBatch], str] = lambda batch: "",
        describe_newest: Callable[[], str] = lambda: "",
    ):
        """Create the guard; `left_out`: the optimizer skips steps that are not finite.

        `most_skipped` steps in a row are counted, and the next one is an error; 0: the first one
        is. For the message, on all ranks: `find_non_finite` names weights and optimizer state that
        are not finite, `find_origin` the module in which a step began to be so, and
        `describe_newest` the checkpoint to continue from.
        """
        self.num_skipped = 0
        """Steps that were skipped since the start of the run; set it on a resume."""
        self._in_a_row = 0
        self._lag = lag
        self._left_out = left_out
        self._most_skipped = most_skipped
        self._find_non_finite = find_non_finite
        self._find_origin = find_origin
        self._describe_newest = describe_newest
        self._pending: deque[tuple[StepBatch, Tensor, torch.cuda.Event | None]] = deque()

    def record(self, batch: StepBatch, is_finite: Tensor) -> None:
        """Take a step's `is_finite`, a bool scalar on the device. Call before the step's update.

        Raises NonFiniteError for this step or, on a GPU, for the one before, whose update was left
        out and whose weights are still there.
        """
        flag = is_finite.to("cpu", non_blocking=True)
        ready = None
        if is_finite.is_cuda:
            ready = torch.cuda.Event()
            ready.record()
        self._pending.append((batch, flag, ready))
        while len(self._pending) > self._lag:
            self._check()

    def flush(self) -> None:
        """Wait for all steps so far; call before saving their result."""
        while self._pending:
            self._check()

    def _check(self) -> None:
        batch, flag, ready = self._pending.popleft()
        if ready is not None:
            ready.synchronize()
        if bool(flag):
            self._in_a_row = 0
            return
        self._in_a_row += 1
        spoilt = self._find_non_finite()
        facts = [
            f"step {batch.step}: the loss or the gradient norm is not finite.",
            self._state(spoilt),
            self._find_origin(batch),
        ]
        if self._in_a_row > self._most_skipped or spoilt:
            if self._most_skipped and not spoilt:
                most = f"training.max_skipped_steps = {self._most_skipped}"
                facts.append(f"More steps in a row were skipped than {most}.")
            facts += [
                "Lower optimizer.lr, lengthen the warmup, or look at the data of that step.",
                self._describe_newest(),
            ]
            raise NonFiniteError(" ".join(filter(None, facts)))
        self.num_skipped += 1
        logger.warning(" ".join(filter(None, facts)))

    def _state(self, spoilt: str) -> str:
        """Describe the weights, of which `spoilt` are not finite."""
        if not self._left_out:
            lost = f" These hold NaN or infinity: {spoilt}." if spoilt else ""
            return f"With optimizer.early_step_in_backward it has changed the weights.{lost}"
        if not spoilt:
            return "Its update was left out, and all weights and optimizer state are finite."
        return (
            f"Its update was left out, but these hold NaN or infinity: {spoilt}. The update of an"
            " earlier step, or a handler's hook, has made them so."
        )
