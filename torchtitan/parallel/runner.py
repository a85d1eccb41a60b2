"""The runner: forward and backward of one step's microbatches.

The loss of a step is the sum of the cross entropies of all its targets, over all microbatches and
all data ranks, divided by their number. The runner owns that division: each microbatch's sum is
divided by the step's number of targets before its backward, and gradients are only ever summed.
"""

from collections.abc import Callable, Mapping, Sequence
from typing import Any, Protocol

import torch
import torch.distributed as dist
from torch import Tensor, nn

from torchtitan.models.batch import Batch
from torchtitan.parallel.data_parallel import free_gathered, set_gradient_sync
from torchtitan.parallel.random_streams import TOKEN_INDEX, RandomStreams


class Loss(Protocol):
    """A loss summed over targets.

    Optional members:

    - `evaluation`: the `Loss` to evaluate with, instead of the plain cross entropy;
    - `has_perplexity`: False where the exponential of its mean means nothing;
    - `frozen_pass()`: what to evaluate a frozen model with before each step, a `FrozenPass`, or
      None;
    - `sequence_group`: set to the ranks that each hold a share of every sequence, or None;
    - `terms`: names of further values to log, and `take_terms()`, which returns and resets their
      sums over the targets of the microbatches so far, by name; trained or evaluated ones.
    """

    def count(self, batch: Batch) -> Tensor:
        """Return the number of targets, an int64 scalar."""

    def sum(self, hidden: Tensor, head: nn.Module, batch: Batch) -> Tensor:
        """Return the sum over a microbatch's targets, a scalar; `hidden` is `[B, T, D]`."""


class FrozenPass(Loss, Protocol):
    """Records what a loss wants to know from a frozen model, where its loss would be computed."""

    def annotated(self, microbatches: Sequence[Batch]) -> list[Batch]:
        """Return the batches, which were evaluated in this order, with what was recorded."""


class Runner(Protocol):
    """The interface of all runners."""

    loss: Loss
    evaluation_loss: Loss
    streams: RandomStreams
    """The model's random numbers; set `streams.step` before `forward_backward`."""
    terms: Mapping[str, Tensor]
    """The last step's loss terms by name: means over all its targets, scalars."""
    evaluated_terms: Mapping[str, Tensor]
    """The terms of the loss that was evaluated last, summed over its targets, scalars."""

    def forward_backward(self, microbatches: Sequence[Batch], num_targets: int) -> Tensor:
        """Accumulate the gradients of a step and return its loss.

        The loss is the mean over `num_targets`, a scalar on the device, the same on all ranks. All
        ranks must call it.
        """

    def evaluate(self, microbatches: Sequence[Batch], loss: Loss | None = None) -> Tensor:
        """Return the evaluation loss summed over the targets of all ranks' microbatches.

        `loss` is summed instead of the evaluation loss.
        """


class RunnerBase:
    """The members that all runners have."""

    def __init__(
        self,
        loss: Loss,
        device: torch.device,
        input_names: Sequence[str],
        *,
        evaluation_loss: Loss | None = None,
        shard_batch: Callable[[Batch], Batch] | None = None,
        is_loss_leader: bool = True,
        streams: RandomStreams | None = None,
    ):
        """Keep what a step needs.

        `input_names`: the tensors of a batch that the forward takes, tokens first.
        `evaluation_loss`: `loss`, unless given. `shard_batch` takes this rank's share of a batch
        under context parallelism. `is_loss_leader` is False where another rank computes, and adds,
        the same loss. `streams`: those of one rank and seed 0, unless given.
        """
        self.loss = loss
        self.evaluation_loss = loss if evaluation_loss is None else evaluation_loss
        self.terms: Mapping[str, Tensor] = {}
        self.evaluated_terms: Mapping[str, Tensor] = {}
        self.device = device
        self.input_names = tuple(input_names)
        self.is_loss_leader = is_loss_leader
        self.streams = RandomStreams(0, device) if streams is None else streams
        self._shard_batch = shard_batch

    def _prepare(self, batch: Batch) -> Batch:
        """Return this rank's share of the batch on the device."""
        batch = batch.to(self.device, non_blocking=True)
        if self.streams.needs_token_index and TOKEN_INDEX not in batch:
            tokens = batch["tokens"]
            numbers = torch.arange(tokens.size(1), device=tokens.device)
            batch = Batch({**batch, TOKEN_INDEX: numbers.expand_as(tokens)})
        return batch if self._shard_batch is None else self._shard_batch(batch)


class SPMDRunner(RunnerBase):
    """Runs a model without pipeline stages: every rank runs the whole forward."""

    def __init__(self, model: nn.Module, *args: Any, **kwargs: Any):
        """See `RunnerBase`."""
        super().__init__(*args, **kwargs)
        self.model = model
        self.streams.attach(model)

    def forward_backward(self, microbatches: Sequence[Batch], num_targets: int) -> Tensor:
        """See `Runner`."""
        assert num_targets > 0, "a step without targets has no mean"
        self.model.train()
        total, num_sequences = None, 0
        for index, batch in enumerate(microbatches):
            set_gradient_sync(self.model, enabled=index == len(microbatches) - 1)
            batch = self._prepare(batch)
            self.streams.begin_microbatch(num_sequences, batch.get(TOKEN_INDEX))
            num_sequences += len(batch["tokens"])
            loss = self._sum(self.loss, batch) / num_targets
            loss.backward()
            total = loss.detach() if total is None else total + loss.detach()
        assert total is not None
        self.streams.end_microbatches()
        terms = terms_of(self.loss)
        loss, self.terms = add_over_ranks(self.loss, total, terms, num_targets, self.is_loss_leader)
        return loss

    @torch.no_grad()
    def evaluate(self, microbatches: Sequence[Batch], loss: Loss | None = None) -> Tensor:
        """See `Runner`."""
        self.model.eval()
        loss = loss or self.evaluation_loss
        total = torch.zeros((), dtype=torch.float64, device=self.device)
        for batch in microbatches:
            total += self._sum(loss, self._prepare(batch))
        free_gathered(self.model)
        total, self.evaluated_terms = add_over_ranks(
            loss, total, terms_of(loss), 1, self.is_loss_leader
        )
        return total

    def _sum(self, loss: Loss, batch: Batch) -> Tensor:
        hidden = self.model(**{name: batch[name] for name in self.input_names})
        return loss.sum(hidden, self.model.head, batch)  # type: ignore[arg-type]


def frozen_pass_of(loss: Loss) -> FrozenPass | None:
    """Return what `loss` wants a frozen model to be evaluated with; None if it needs none."""
    make: Callable[[], FrozenPass | None] = getattr(loss, "frozen_pass", lambda: None)
    return make()


def over_ranks(total: Tensor, is_loss_leader: bool) -> Tensor:
    """Add `total` over the ranks that are loss leaders, in place."""
    if not is_loss_leader:
        total.zero_()
    dist.all_reduce(total)
    return total


def terms_of(loss: Loss) -> Mapping[str, Tensor]:
    """Take the sums of a step's or an evaluation's terms from `loss`.

    Raises ValueError unless they are the terms that the loss declares.
    """
    names = getattr(loss, "terms", ())
    if not names:
        return {}
    sums: Mapping[str, Tensor] = loss.take_terms()  # type: ignore[attr-defined]
    for problem, wrong in (
        ("reports terms that it does not declare", sums.keys() - set(names)),
        ("declares terms that it did not report in this step", set(names) - sums.keys()),
    ):
        if wrong:
            raise ValueError(
                f"the loss {type(loss).__name__} {problem}: {', '.join(sorted(wrong))}"
            )
    return sums


def add_over_ranks(
    loss: Loss, total: Tensor, terms: Mapping[str, Tensor], num_targets: int, is_loss_leader: bool
) -> tuple[Tensor, Mapping[str, Tensor]]:
    """Return a loss, and its terms divided by `num_targets`, over all ranks, in one all-reduce.

    `total` is this rank's part of the loss; `terms` are its sums over targets, empty on ranks
    without the last stage of a pipeline.
    """
    names = getattr(loss, "terms", ())
    zero = torch.zeros_like(total)
    parts = [terms[name].to(total) / num_targets if name in terms else zero for name in names]
    of_step, *means = over_ranks(torch.stack([total, *parts]), is_loss_leader).unbind()
    return of_step, dict(zip(names, means, strict=True))
