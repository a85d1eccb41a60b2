"""Finding where a step stopped being finite: a second pass over its batch, module by module.

The update of such a step is left out, so the weights are those that it computed with, and random
numbers are a function of the step: the second pass repeats the first one. Every module is watched,
its outputs in the forward and the gradients of its inputs in the backward, without compilation.
"""

import logging
from collections.abc import Callable, Iterator, Sequence
from contextlib import contextmanager
from dataclasses import asdict, dataclass

import torch
from torch import Tensor

from torchtitan.config import NonFiniteError
from torchtitan.distributed.context import DistributedContext
from torchtitan.distributed.finiteness import non_finite_on_any_rank
from torchtitan.models.batch import Batch
from torchtitan.parallel.random_streams import RandomStreams
from torchtitan.parallel.runner import Runner
from torchtitan.training.model_builder import BuiltModel
from torchtitan.training.module_watch import Direction, ModuleUse, ModuleWatch
from torchtitan.utils.text import some_of

logger = logging.getLogger(__name__)

_SHOWN_TOKENS, _SHOWN_CHARACTERS = 64, 100


@dataclass(frozen=True)
class StepBatch:
    """The batch of a step on this rank, as the runner took it."""

    step: int
    microbatches: Sequence[Batch]
    num_targets: int


@dataclass(frozen=True)
class _Event:
    """The first values of a rank that are not finite, in one direction."""

    module: str
    rank: int
    first: int
    """Number among this rank's sequences of the first one of the microbatch."""
    order: int
    """Modules that were entered before it in this microbatch."""
    sequence: int | None
    """Number of the sequence within the step; None where it cannot be told."""
    text: str = ""
    """The beginning of that sequence."""


def find_origin(
    world: DistributedContext,
    model: BuiltModel,
    runner: Runner,
    batch: StepBatch,
    decode: Callable[[list[int]], str],
    keep_gradients: bool,
) -> str:
    """Describe the first values of a step that are not finite. All ranks must call it.

    `runner` repeats the step. Gradients are as before afterwards, or None without
    `keep_gradients`, which takes their memory once more and is for a run that goes on: it raises
    NonFiniteError if the pass fails. `decode` turns tokens into text.
    """
    found = _FirstNonFinite(world.rank, runner.streams, batch, decode)
    watch = ModuleWatch(runner.streams, found.report)
    try:
        with (
            watch.modules(model.parts, runs_compiled=False),
            _undone(model, runner, keep_gradients),
        ):
            runner.streams.step = batch.step
            loss = runner.forward_backward(batch.microbatches, batch.num_targets)
            gradients = {
                name: parameter.grad
                for part in model.parts
                for name, parameter in part.named_parameters()
                if parameter.grad is not None
            }
            of_gradients = non_finite_on_any_rank(world, gradients)
    except Exception as error:
        logger.warning("The second pass over the batch of step %d failed: %r", batch.step, error)
        if keep_gradients:  # the next step would meet other ranks, or a model, within this pass
            text = f"step {batch.step}: the loss or the gradient norm is not finite, and"
            raise NonFiniteError(f"{text} a second pass failed: {error!r}") from error
        return ""  # the error to report is the step's
    stages = list(model.args.modules())
    for direction, own in found.first.items():
        events = [
            _Event(**event) for event in world.gather_json(own and asdict(own)) if event is not None
        ]
        if events:
            return _describe(direction, events, stages)
    if of_gradients:
        return f"A second pass finds it in gradients of weights alone: {some_of(of_gradients)}."
    if not torch.isfinite(loss):
        return "A second pass finds it in the loss alone: what the modules compute is finite."
    return (
        "A second pass over the same batch is finite: the first was changed by a fault of the"
        " machine, or by code that computes something else each time."
    )


def _describe(direction: str, events: Sequence[_Event], stages: Sequence[str]) -> str:
    sign = 1 if direction == "forward" else -1

    def place(event: _Event) -> tuple[int, int, int]:
        parts = event.module.split(".")
        stage = next((".".join(parts[:n]) for n in (1, 2) if ".".join(parts[:n]) in stages), "")
        number = stages.index(stage) if stage else 0
        return event.first, sign * number, sign * event.order

    first = min(events, key=place)
    ranks = [str(event.rank) for event in events if place(event) == place(first)]
    what = "output" if direction == "forward" else "gradient of the input"
    where = f" in sequence {first.sequence} of the step" if first.sequence is not None else ""
    text = f", which begins {first.text!r}" if first.text else ""
    return (
        f"In a second pass, the {what} of {first.module} is the first that is not finite, on rank"
        f"{'s' * (len(ranks) > 1)} {', '.join(ranks)}{where}{text}."
    )


@contextmanager
def _undone(model: BuiltModel, runner: Runner, keep_gradients: bool) -> Iterator[None]:
    """Take the gradients away, and put them and the state of `runner` back afterwards."""
    gradients = [parameter.grad if keep_gradients else None for parameter in model.parameters]
    step, terms = runner.streams.step, runner.terms
    for parameter in model.parameters:
        parameter.grad = None
    try:
        with torch.compiler.set_stance("force_eager"):
            yield
    finally:
        for parameter, gradient in zip(model.parameters, gradients, strict=True):
            parameter.grad = gradient
        runner.streams.step, runner.terms = step, terms
        runner.streams.end_microbatches()


class _FirstNonFinite:
    """The first value of this rank that is not finite, in each direction."""

    def __init__(
        self,
        rank: int,
        streams: RandomStreams,
        batch: StepBatch,
        decode: Callable[[list[int]], str],
    ):
        self.first: dict[str, _Event | None] = {"forward": None, "backward": None}
        self._rank, self._streams, self._decode = rank, streams, decode
        self._tokens = [row for batch in batch.microbatches for row in batch["tokens"]]

    def report(self, direction: Direction, use: ModuleUse, number: int, value: Tensor) -> None:
        """Keep `value` if it is the first one that is not finite; a mask may hold -inf."""
        if self.first[direction] is not None:
            return
        is_finite = value.detach().isfinite()
        if direction == "forward" and not value.requires_grad:
            is_finite |= value.isneginf()
        if is_finite.all():
            return
        sequence, text = None, ""
        if value.dim() > 2 and len(value) == use.num_sequences:
            row = use.first_sequence + int(is_finite.flatten(1).all(1).logical_not().nonzero()[0])
            sequence = self._streams.sequence_number(row)
            text = self._decode(self._tokens[row][:_SHOWN_TOKENS].tolist())[:_SHOWN_CHARACTERS]
        self.first[direction] = _Event(
            use.name, self._rank, use.first_sequence, use.order, sequence, text
        )
