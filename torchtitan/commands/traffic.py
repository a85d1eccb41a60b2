"""Counts of collectives and their bytes by axis of the mesh.

A torch *dispatch mode* sees every operator before it runs, collectives included, in compiled code
too. With fake tensors torch does not run this library's custom operators; here they run, so that
the collectives inside are counted.
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
"""By prefix of torch's operators without underscores. A receive is not counted: its send is."""


class Traffic(TorchDispatchMode):
    """A mode that counts the collectives of this process while entered."""

    supports_higher_order_operators = True

    def __init__(self, axes: Mapping[str, str]):
        """`axes` maps torch's names of process groups to names for the report."""
        super().__init__()
        self.calls: Counter[tuple[str, str]] = Counter()
        """Calls by (axis, collective)."""
        self.num_bytes: Counter[tuple[str, str]] = Counter()
        """Bytes of whole tensors: the output of an all-gather, the input of a reduce-scatter."""
        self.unknown: set[str] = set()
        """Operators that were not traced because their collectives depend on values."""
        self._axes = axes

    @classmethod
    def is_infra_mode(cls) -> bool:
        """Return True: compiled code runs under infra modes only."""
        return True

    def copies(self) -> tuple[Counter[tuple[str, str]], Counter[tuple[str, str]]]:
        """Return copies of both counters."""
        return self.calls.copy(), self.num_bytes.copy()

    def add(self, calls: Counter[tuple[str, str]], num_bytes: Counter[tuple[str, str]]) -> None:
        """Add counts of collectives that are not run again."""
        self.calls.update(calls)
        self.num_bytes.update(num_bytes)

    def __torch_dispatch__(
        self, func: Any, types: Any, args: tuple[Any, ...] = (), kwargs: Any = None
    ) -> Any:
        """Handle one operator call."""
        if any(issubclass(kind, DTensor) for kind in types):
            return NotImplemented  # called again for the local tensors
        namespace = getattr(func, "namespace", "")
        if namespace == "torchtitan":
            return self._trace(func, args)
        out = func(*args, **(kwargs or {}))
        if namespace in ("c10d", "_c10d_functional"):
            self._count(func._schema, args, out)
        return out

    def _trace(self, func: Any, args: tuple[Any, ...]) -> Any:
        before = self.copies()
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
        if not kinds:  # for example, waiting for one
            return
        values = {argument.name: value for argument, value in zip(schema.arguments, args)}
        group = values.get("group_name")
        if group is None:
            group = dist.ProcessGroup.unbox(values["process_group"]).group_name
        key = self._axes.get(group, group), kinds[0]
        tensors = [leaf for leaf in tree_leaves((args, out)) if isinstance(leaf, Tensor)]
        self.calls[key] += 1
        self.num_bytes[key] += max(tensor.nbytes for tensor in tensors)
