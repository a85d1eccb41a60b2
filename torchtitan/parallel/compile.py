"""torch.compile, block by block.

All blocks have the same code, so one compilation serves them all, and takes the same time for 4
layers as for 126. A handler marks what is to be compiled; when it happens is fixed by the order of
passes.

A memory budget tells the compiler how much of a block's activations may wait for the backward. It
chooses what to compute again, the cheapest for the memory that it takes.
"""

from collections.abc import Callable, Mapping
from functools import cache, partial
from typing import Any

import torch._dynamo.config
import torch._functorch.config
from torch import nn

from torchtitan.config.schema import ActivationCheckpoint

_MARK = "_compile_backend"


Backend = str | Callable[..., Any]
"""Backend of `torch.compile`: a name, or a function of a graph and its inputs."""


def mark_for_compile(block: nn.Module, backend: Backend) -> None:
    """Ask for `block` to be compiled by `backend`."""
    setattr(block, _MARK, backend)


def is_marked_for_compile(block: nn.Module) -> bool:
    """Return whether `block` is compiled, or marked for it."""
    return hasattr(block, _MARK)


def memory_budget_of(section: ActivationCheckpoint) -> float | None:
    """Return the compiler's memory budget, from 0 to 1; None for its default."""
    return section.memory_budget if section.mode == "memory_budget" else None


def apply_compile(blocks: Mapping[str, nn.Module], memory_budget: float | None = None) -> None:
    """Compile the marked blocks in place, each as one full graph; nothing runs yet.

    Blocks that differ, in their class or in a number that they hold, are compiled apart.
    """
    marked = [block for block in blocks.values() if is_marked_for_compile(block)]
    _allow_each(len(marked))
    # One function for all blocks: what another one has compiled would not be reused.
    backend_of = cache(partial(_backend, memory_budget))
    for block in marked:
        block.compile(backend=backend_of(getattr(block, _MARK)), fullgraph=True)


def _allow_each(num_blocks: int) -> None:
    """Let each block be compiled as often as torch lets one function be.

    torch counts by the code of a forward, which blocks share even where they differ. A limit stays:
    without one, a forward that is compiled at every step would only seem slow.
    """
    limits: Any = torch._dynamo.config
    limits.recompile_limit += 8 * num_blocks  # the stages of a pipeline add theirs
    limits.accumulated_recompile_limit += 8 * num_blocks


def _backend(memory_budget: float | None, backend: Backend) -> Backend:
    """Return the backend of this name, with a memory budget for its compilations only."""
    if memory_budget is None:
        return backend
    compile_graph: Any = torch._dynamo.lookup_backend(backend)  # a function as it is

    def compile_within_budget(graph: Any, inputs: Any, **arguments: Any) -> Any:
        with torch._functorch.config.patch(activation_memory_budget=memory_budget):
            return compile_graph(graph, inputs, **arguments)

    return compile_within_budget
