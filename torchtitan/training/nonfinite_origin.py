"""Finding where a step stopped being finite: a second pass over its batch, module by module.

The update of such a step is left out, so the weights are those that it computed with, and random
numbers are a function of the step: the second pass repeats the first one. Every module is watched,
its outputs in the forward and the gradients of its inputs in the backward, without compilation.
"""

import logging
from collections.abc import Callable, Iterator, Sequence
from contextlib import ExitStack, contextmanager
from dataclasses import asdict, dataclass
from functools import partial
from typing import Any

import torch
from torch import Tensor, nn
from torch.utils._pytree import tree_leaves, tree_map

from torchtitan.config import NonFiniteError
from torchtitan.distributed.context import DistributedContext
from torchtitan.distributed.finiteness import non_finite_on_any_rank
from torchtitan.models.batch import Batch
from torchtitan.parallel.random_streams import RandomStreams
from torchtitan.parallel.runner import Runner
from torchtitan.training.model_builder import BuiltModel
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
    watch = _Watch(world.rank, runner.streams, batch, decode)
    try:
        with watch.modules(model.parts), _undone(model, runner, keep_gradients):
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
    for direction, own in watch.first.items():
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


class _Watch:
    """Hooks that keep the first value of this rank that is not finite, in each direction."""

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
        self._order = 0
        self._size = 0

    @contextmanager
    def modules(self, parts: Sequence[nn.Module]) -> Iterator[None]:
        """Watch the modules of `parts` within the context."""
        with ExitStack() as hooks:
            for part in parts:
                handle = part.register_forward_pre_hook(self._begin, prepend=True, with_kwargs=True)
                hooks.callback(handle.remove)
                for name, module in part.named_modules():
                    before = partial(self._before, name or "the model")
                    after = partial(self._after, name or "the model")
                    for handle in (
                        module.register_forward_pre_hook(before, with_kwargs=True),
                        module.register_forward_hook(after),
                    ):
                        hooks.callback(handle.remove)
            yield

    def _begin(self, module: nn.Module, args: tuple[Any, ...], kwargs: dict[str, Any]) -> None:
        if not _is_recomputation():
            self._order = 0
            self._size = len(next(x for x in tree_leaves((args, kwargs)) if isinstance(x, Tensor)))

    def _before(
        self, name: str, module: nn.Module, args: tuple[Any, ...], kwargs: dict[str, Any]
    ) -> tuple[Any, Any]:
        self._order += not _is_recomputation()
        report = partial(self._report, "backward", name, self._order, self._streams.first_sequence)

        def watched(value: Any) -> Any:
            is_watched = isinstance(value, Tensor) and value.requires_grad
            return _WatchedGradient.apply(value, report) if is_watched else value

        watched_args, watched_kwargs = tree_map(watched, (args, kwargs))
        return watched_args, watched_kwargs

    def _after(self, name: str, module: nn.Module, args: object, output: Any) -> None:
        if not _is_recomputation():
            for value in tree_leaves(output):
                if isinstance(value, Tensor) and value.is_floating_point():
                    first = self._streams.first_sequence
                    is_mask = not value.requires_grad
                    self._report("forward", name, self._order, first, value, is_mask)

    def _report(
        self,
        direction: str,
        name: str,
        order: int,
        first: int,
        value: Tensor,
        is_mask: bool = False,
    ) -> None:
        """Keep `value` if it is the first one that is not finite; `is_mask` allows -inf."""
        if self.first[direction] is not None:
            return
        is_finite = value.detach().isfinite()
        if is_mask:
            is_finite |= value.isneginf()
        if is_finite.all():
            return
        sequence, text = None, ""
        if value.dim() > 2 and len(value) == self._size:
            row = first + int(is_finite.flatten(1).all(1).logical_not().nonzero()[0])
            sequence = self._streams.sequence_number(row)
            text = self._decode(self._tokens[row][:_SHOWN_TOKENS].tolist())[:_SHOWN_CHARACTERS]
        self.first[direction] = _Event(name, self._rank, first, order, sequence, text)


class _WatchedGradient(torch.autograd.Function):
    """The identity, which shows the gradient that comes back along one use of a tensor."""

    @staticmethod
    def forward(ctx: Any, value: Tensor, report: Callable[[Tensor], None]) -> Tensor:
        ctx.report = report
        return value.view_as(value)

    @staticmethod
    def backward(ctx: Any, gradient: Tensor) -> tuple[Tensor, None]:
        ctx.report(gradient)
        return gradient, None


def _is_recomputation() -> bool:
    """Return True within activation checkpointing's second forward."""
    return torch._C._current_graph_task_id() != -1
