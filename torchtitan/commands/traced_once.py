"""The compiler backend of dry runs: each graph runs once, and later calls repeat its result.

Blocks of a model share their graphs, and fake tensors tell nothing new when a graph runs again: it
gives the same shapes, and starts the same collectives.
"""

from collections import Counter
from collections.abc import Callable, Sequence
from functools import partial
from typing import Any

import torch
import torch._functorch.config
from torch import Tensor, fx
from torch._dynamo.backends.registry import lookup_backend

from torchtitan.commands.traffic import Traffic

Graph = Callable[[list[Any]], Sequence[Any]]


def traced_once(traffic: Traffic) -> Callable[..., Any]:
    """Return a backend like `aot_eager` for fake tensors; `traffic` counts repeated calls, too."""
    compiler = partial(_compile, traffic)

    def compile_graph(graph: fx.GraphModule, inputs: Any) -> Any:
        # At once, because in a backward torch fails to copy a graph with constants: a fake tensor
        # cannot take the storage of a real one.
        with torch._functorch.config.patch(force_non_lazy_backward_lowering=True):
            aot_eager: Any = lookup_backend("aot_eager")
            return aot_eager(graph, inputs, fw_compiler=compiler, bw_compiler=compiler)

    return compile_graph


def _compile(traffic: Traffic, graph: fx.GraphModule, inputs: Sequence[Any]) -> Graph:
    graph.graph.set_codegen(fx.graph._BoxedCodeGen())
    graph.recompile()
    run = _Repeated(graph.forward, traffic)
    run._boxed_call = True
    return run


class _Repeated:
    """A graph, called with a list of inputs that it empties."""

    _boxed_call: bool

    def __init__(self, forward: Graph, traffic: Traffic):
        self._forward = forward
        self._traffic = traffic
        self._makers: dict[tuple[Any, ...], list[Callable[[list[Any]], Any]]] = {}
        """Makers of the outputs, by the shapes of the inputs, which a graph may leave open."""
        self._counted: dict[tuple[Any, ...], list[Counter[tuple[str, str]]]] = {}

    def __call__(self, args: list[Any]) -> Sequence[Any]:
        """Run the graph, or make outputs like those of the first run."""
        key = tuple((a.shape, a.stride()) if isinstance(a, Tensor) else a for a in args)
        if key in self._makers:
            self._traffic.add(*self._counted[key])
            outputs = [make(args) for make in self._makers[key]]
            args.clear()
            return outputs
        given, before = list(args), self._traffic.copies()
        found = self._forward(args)
        both = zip(self._traffic.copies(), before, strict=True)
        self._counted[key] = [now - then for now, then in both]
        self._makers[key] = [_maker(output, given) for output in found]
        return found


def _maker(output: Any, args: list[Any]) -> Callable[[list[Any]], Any]:
    """Return a function of the inputs that gives an output like this one."""
    for place, value in enumerate(args):
        if output is value:
            return lambda args: args[place]
    if not isinstance(output, Tensor):
        return lambda args: output
    shape, stride = tuple(output.shape), output.stride()
    dtype, device = output.dtype, output.device
    return lambda args: torch.empty_strided(shape, stride, dtype=dtype, device=device)
