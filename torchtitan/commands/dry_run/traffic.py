"""Counts collectives, and what they move, by the axis of the mesh that they go along.

Torch shows every operator to a *dispatch mode* before it runs, and its collectives are operators
too, in compiled code as elsewhere. An operator of this library hides those that it calls from fake
tensors, for which torch takes its declared result; here its implementation is run instead.
"""

from collections import Counter
from collections.abc import Mapping
from typing import Any

import torch.distributed as dist
from torch import Tensor
from torch._library.custom_ops import OPDEFS
from torch._subclasses.fake_tensor import DataDependentOutputException
from torch.distributed.tensor import DTensor
from torch.utils._python_dispatch import TorchDispatchMode
from torch.utils._pytree import tree_leaves

_COLLECTIVES = {
    "allgather": "all-gather",
    "allreduce": "all-reduce",
    "alltoall": "all-to-all",
    "broadcast": "broadcast",
    "reducescatter": "reduce-scatter",
    "send": "send",
}
"""By how torch's operators begin, without their underscores. What is sent is not counted again
where it is received."""


class Traffic(TorchDispatchMode):
    """While entered, counts the collectives of this process."""

    supports_higher_order_operators = True

    def __init__(self, axes: Mapping[str, str]):
        """`axes`: what to call the process groups, by their names in torch."""
        super().__init__()
        self.calls: Counter[tuple[str, str]] = Counter()
        """By axis and collective."""
        self.num_bytes: Counter[tuple[str, str]] = Counter()
        """Of whole tensors: what an all-gather gives, what a reduce-scatter takes."""
        self.unknown: set[str] = set()
        """Operators that were not looked into, as what they do depends on values."""
        self._axes = axes

    @classmethod
    def is_infra_mode(cls) -> bool:
        """Compiled code would not run under any other mode."""
        return True

    def __torch_dispatch__(
        self, func: Any, types: Any, args: tuple[Any, ...] = (), kwargs: Any = None
    ) -> Any:
        """What torch calls in the place of an operator."""
        if any(issubclass(kind, DTensor) for kind in types):
            return NotImplemented  # come again with what this does to local tensors
        namespace = getattr(func, "namespace", "")
        if namespace == "torchtitan":
            return self._look_into(func, args)
        out = func(*args, **(kwargs or {}))
        if namespace in ("c10d", "_c10d_functional"):
            self._count(func._schema, args, out)
        return out

    def _look_into(self, func: Any, args: tuple[Any, ...]) -> Any:
        before = self.calls.copy(), self.num_bytes.copy()
        try:
            with self:
                return OPDEFS[func._schema.name]._init_fn(*args)
        except DataDependentOutputException:
            self.calls, self.num_bytes = before
            self.unknown.add(func._schema.name)
            return func(*args)

    def _count(self, schema: Any, args: tuple[Any, ...], out: Any) -> None:
        operator = schema.name.split("::")[1].replace("_", "")
        kinds = [kind for start, kind in _COLLECTIVES.items() if operator.startswith(start)]
        if not kinds:  # waiting for one
            return
        values = {argument.name: value for argument, value in zip(schema.arguments, args)}
        group = values.get("group_name")
        if group is None:
            group = dist.ProcessGroup.unbox(values["process_group"]).group_name
        key = self._axes.get(group, group), kinds[0]
        tensors = [leaf for leaf in tree_leaves((args, out)) if isinstance(leaf, Tensor)]
        self.calls[key] += 1
        self.num_bytes[key] += max(tensor.nbytes for tensor in tensors)
