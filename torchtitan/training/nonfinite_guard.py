"""Detecting a step that is not finite, without making the host wait for every step.

The device skips the update of such a step, so the host may learn of it late: on a GPU one step
later, when reading the flag no longer stalls the device. (A step in the backward cannot be skipped:
the weights are lost, but nothing is saved before the host knows.) A skipped update does not mean
that the weights are good, because an earlier one may have spoilt them; so the error reports which
are not finite.
"""

from collections import deque
from collections.abc import Callable

import torch
from torch import Tensor

from torchtitan.config import NonFiniteError


class NonFiniteGuard:
    """Raises NonFiniteError for a step that was not finite, at most `lag` steps late.

    The flags are the same on all ranks (they come from reduced values): all raise at the same step.
    """

    def __init__(
        self,
        lag: int,
        left_out: bool = True,
        find_non_finite: Callable[[], str] = lambda: "",
        describe_newest: Callable[[], str] = lambda: "",
    ):
        """Create the guard; `left_out`: the optimizer skips steps that are not finite.

        For the error, on all ranks: `find_non_finite` names weights and optimizer state that are
        not finite; `describe_newest` names the checkpoint to continue from.
        """
        self._lag = lag
        self._left_out = left_out
        self._find_non_finite = find_non_finite
        self._describe_newest = describe_newest
        self._pending: deque[tuple[int, Tensor, torch.cuda.Event | None]] = deque()

    def record(self, step: int, is_finite: Tensor) -> None:
        """Take a step's `is_finite`, a bool scalar on the device."""
        flag = is_finite.to("cpu", non_blocking=True)
        ready = None
        if is_finite.is_cuda:
            ready = torch.cuda.Event()
            ready.record()
        self._pending.append((step, flag, ready))
        while len(self._pending) > self._lag:
            self._check()

    def flush(self) -> None:
        """Wait for all steps so far; call before saving their result."""
        while self._pending:
            self._check()

    def _check(self) -> None:
        step, flag, ready = self._pending.popleft()
        if ready is not None:
            ready.synchronize()
        if not bool(flag):
            raise NonFiniteError(
                f"step {step}: the loss or the gradient norm is not finite. {self._state()} Lower"
                " optimizer.lr, lengthen the warmup, or look at the data of that step."
                f" {self._describe_newest()}"
            )

    def _state(self) -> str:
        """Describe the weights."""
        names = self._find_non_finite()
        if not self._left_out:
            lost = f" These hold NaN or infinity: {names}." if names else ""
            return f"With optimizer.early_step_in_backward it has changed the weights.{lost}"
        if not names:
            return "Its update was left out, and all weights and optimizer state are finite."
        return (
            f"Its update was left out, but these hold NaN or infinity: {names}. The update of an"
            " earlier step, or a handler's hook, has made them so."
        )
