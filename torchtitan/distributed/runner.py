"""The runner: forward and backward of one step's microbatches, however the model is cut.

The loss of a step is the sum of the cross entropies of all its targets, over all microbatches and
all data ranks, divided by their number. The runner owns that division: each microbatch's sum is
divided by the step's number of targets before its backward, and gradients are only ever summed.
"""

from collections.abc import Callable, Sequence
from typing import Protocol

import torch
import torch.distributed as dist
from torch import Tensor, nn

from torchtitan.distributed.data_parallel import free_gathered, set_gradient_sync
from torchtitan.models.batch import Batch


class Loss(Protocol):
    """An un-normalised loss."""

    def count(self, batch: Batch) -> Tensor:
        """Number of targets, int64 scalar."""

    def sum(self, hidden: Tensor, head: nn.Module, batch: Batch) -> Tensor:
        """Sum over the targets of a microbatch, scalar; `hidden` is `[B, T, D]`."""


class Runner(Protocol):
    """What the loop needs of any runner."""

    loss: Loss

    def forward_backward(self, microbatches: Sequence[Batch], num_targets: int) -> Tensor:
        """Accumulate the gradients of the step; returns its loss (mean over `num_targets`), a
        scalar on the device that is the same on all ranks. All ranks must call it."""

    def evaluate(self, microbatches: Sequence[Batch]) -> Tensor:
        """Sum of the loss over all targets of the microbatches on all ranks, without gradients."""


class WholeModelRunner:
    """Runs a model that is whole on every rank (as far as the code of its forward can tell)."""

    def __init__(
        self,
        model: nn.Module,
        loss: Loss,
        device: torch.device,
        input_names: Sequence[str],
        *,
        cut: Callable[[Batch], Batch] | None = None,
        counts_loss: bool = True,
    ):
        """`input_names`: the tensors of a batch that the model's forward takes. `cut` takes this
        rank's part of a batch whose sequences are spread over ranks. `counts_loss` is False where
        another rank computes, and adds, the same loss."""
        self.model = model
        self.loss = loss
        self.device = device
        self.input_names = tuple(input_names)
        self.cut = cut
        self.counts_loss = counts_loss

    def forward_backward(self, microbatches: Sequence[Batch], num_targets: int) -> Tensor:
        """See `Runner`."""
        assert num_targets > 0, "a step without targets has no mean"
        self.model.train()
        total = None
        for index, batch in enumerate(microbatches):
            set_gradient_sync(self.model, enabled=index == len(microbatches) - 1)
            loss = self._sum(batch) / num_targets
            loss.backward()
            total = loss.detach() if total is None else total + loss.detach()
        assert total is not None
        return self._over_ranks(total)

    @torch.no_grad()
    def evaluate(self, microbatches: Sequence[Batch]) -> Tensor:
        """See `Runner`."""
        self.model.eval()
        total = torch.zeros((), dtype=torch.float64, device=self.device)
        for batch in microbatches:
            total += self._sum(batch)
        free_gathered(self.model)
        return self._over_ranks(total)

    def _over_ranks(self, total: Tensor) -> Tensor:
        if not self.counts_loss:
            total.zero_()
        dist.all_reduce(total)
        return total

    def _sum(self, batch: Batch) -> Tensor:
        batch = batch.to(self.device, non_blocking=True)
        if self.cut is not None:
            batch = self.cut(batch)
        hidden = self.model(**{name: batch[name] for name in self.input_names})
        return self.loss.sum(hidden, self.model.head, batch)  # type: ignore[arg-type]
