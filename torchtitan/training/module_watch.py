"""Hooks that show every module's outputs in the forward, and its inputs' gradients in the backward.

They see the same tensors under every parallelism and activation checkpointing. A compiled block is
seen whole: its own output and the gradients of its inputs.
"""

from collections import Counter
from collections.abc import Callable, Iterator, Sequence
from contextlib import ExitStack, contextmanager
from dataclasses import dataclass
from functools import partial
from typing import Any, Literal

import torch
from torch import Tensor, nn
from torch.utils._pytree import tree_leaves, tree_map

from torchtitan.parallel.compile import is_marked_for_compile
from torchtitan.parallel.random_streams import RandomStreams

WHOLE_MODEL = "the model"
"""The name of what has none: the model, or a pipeline stage of it."""

Direction = Literal["forward", "backward"]


@dataclass(frozen=True)
class ModuleUse:
    """One use of a module in the forward of a microbatch."""

    module: nn.Module
    name: str
    order: int
    """Modules that were entered in this microbatch before it, and it."""
    number: int
    """Uses of this module in this microbatch, this one counted."""
    part: int
    """Index of the part of the model that it is in."""
    first_sequence: int
    """Number among this rank's sequences of the first one of the microbatch."""
    num_sequences: int
    places: Tensor | None
    """Places of the microbatch's tokens in the step, `[B, T]`."""


Report = Callable[[Direction, ModuleUse, int, Tensor], None]
"""Takes the direction, the use, the number of the output or input, and its value or gradient."""


class ModuleWatch:
    """Hooks that call `report` for each tensor."""

    def __init__(
        self,
        streams: RandomStreams,
        report: Report,
        places: Callable[[], Tensor | None] = lambda: None,
    ):
        """`places` returns `ModuleUse.places` for the microbatch at hand."""
        self._streams, self._report, self._places = streams, report, places
        self._order = self._num_sequences = 0
        self._uses: Counter[nn.Module] = Counter()
        self._current: dict[nn.Module, ModuleUse] = {}

    @contextmanager
    def modules(self, parts: Sequence[nn.Module], runs_compiled: bool) -> Iterator[None]:
        """Watch the modules of `parts` within the context.

        `runs_compiled`: blocks marked for it are compiled, and seen from outside.
        """
        chosen = _outside_compiled if runs_compiled else nn.Module.named_modules
        with ExitStack() as hooks:
            for number, part in enumerate(parts):
                handle = part.register_forward_pre_hook(self._begin, prepend=True, with_kwargs=True)
                hooks.callback(handle.remove)
                for name, module in chosen(part):
                    before = partial(self._before, name or WHOLE_MODEL, number)
                    for handle in (
                        module.register_forward_pre_hook(before, with_kwargs=True),
                        module.register_forward_hook(self._after),
                    ):
                        hooks.callback(handle.remove)
            yield

    def _begin(self, module: nn.Module, args: tuple[Any, ...], kwargs: dict[str, Any]) -> None:
        if not _is_recomputation():
            self._order = 0
            self._uses.clear()
            tensors = (x for x in tree_leaves((args, kwargs)) if isinstance(x, Tensor))
            self._num_sequences = len(next(tensors))

    @torch.compiler.disable
    def _before(
        self,
        name: str,
        part: int,
        module: nn.Module,
        args: tuple[Any, ...],
        kwargs: dict[str, Any],
    ) -> tuple[Any, Any]:
        if not _is_recomputation():
            self._order += 1
            self._uses[module] += 1
            self._current[module] = ModuleUse(
                module,
                name,
                self._order,
                self._uses[module],
                part,
                self._streams.first_sequence,
                self._num_sequences,
                self._places(),
            )
        use, number = self._current[module], 0

        def watched(value: Any) -> Any:
            nonlocal number
            if not (isinstance(value, Tensor) and value.requires_grad):
                return value
            number += 1
            return _WatchedGradient.apply(value, partial(self._report, "backward", use, number))

        watched_args, watched_kwargs = tree_map(watched, (args, kwargs))
        return watched_args, watched_kwargs

    @torch.compiler.disable
    def _after(self, module: nn.Module, args: object, output: Any) -> None:
        if not _is_recomputation():
            for number, value in enumerate(tree_leaves(output), start=1):
                if isinstance(value, Tensor) and value.is_floating_point():
                    self._report("forward", self._current[module], number, value)


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


def _outside_compiled(part: nn.Module) -> Iterator[tuple[str, nn.Module]]:
    """Yield each module by name, but none inside a compiled block."""
    inside: set[nn.Module] = set()
    for name, module in part.named_modules():
        if module not in inside:
            yield name, module
            if is_marked_for_compile(module):
                inside |= set(module.modules()) - {module}


def _is_recomputation() -> bool:
    """Return True within activation checkpointing's second forward."""
    return torch._C._current_graph_task_id() != -1
