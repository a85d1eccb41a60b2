"""Tensor parallelism of float8 linears: what they would round by one scale is sent rounded.

A linear that is cut multiplies with its part of the matrix, in float8, and needs nothing for it.
But before it, the sequence is gathered. With the recipe `tensorwise` an input has one scale: then
each rank rounds its part, by the largest number of all parts, and half the bytes are sent. The
linears find the very numbers that they would have rounded themselves. Gradients come back in high
precision, as sums have to be, and so do the outputs.
"""

from collections.abc import Collection
from dataclasses import replace
from functools import cache
from typing import Any

import torch
from torch import Tensor
from torchao.float8.float8_training_tensor import (
    Float8TrainingTensor,
    GemmInputRole,
    LinearMMConfig,
)
from torchao.float8.float8_utils import amax_to_scale, to_fp8_saturated

from torchtitan.parallel.tensor_parallel import (
    CutModule,
    GatherInput,
    ParallelStyle,
    all_gather_parts,
    reduce_scatter_sum,
)

_C10D = torch.ops._c10d_functional


def gather_in_float8(
    plan: dict[str, ParallelStyle],
    swapped: Collection[str],
    options: LinearMMConfig,
    dtype: torch.dtype,
) -> None:
    """Change the styles of modules that gather their input, where all who take it are `swapped`:
    they round it to `dtype`, and multiply with `options`."""
    for name, style in plan.items():
        if style.mixin is not GatherInput or style.placement is not None:
            continue
        takers = [
            other
            for other, taken in plan.items()
            if other.startswith(f"{name}.") and taken.mixin is CutModule
        ]
        if takers and all(taker in swapped for taker in takers):
            plan[name] = replace(style, mixin=_gathering(options, dtype))


@cache
def _gathering(options: LinearMMConfig, dtype: torch.dtype) -> type[CutModule]:
    """One class for all modules alike, as blocks have to stay alike to the compiler."""
    return type("GatherFloat8Input", (_GatherFloat8Input,), {"options": options, "dtype": dtype})


class _GatherFloat8Input(CutModule):
    options: LinearMMConfig
    dtype: torch.dtype

    def forward(self, x: Tensor, *args: Any, **kwargs: Any) -> Any:
        group = self.group
        gathered = _GatherFloat8.apply(x, group.name, group.size, self.options, self.dtype)
        return super().forward(gathered, *args, **kwargs)


@torch._dynamo.allow_in_graph
class _GatherFloat8(torch.autograd.Function):
    """`[B, T/tp, D]` to a float8 tensor of `[B, T, D]`; its gradient is summed and cut."""

    @staticmethod
    def forward(
        ctx: Any, x: Tensor, name: str, size: int, options: LinearMMConfig, dtype: torch.dtype
    ) -> Tensor:
        ctx.group = name, size
        largest = _C10D.wait_tensor(_C10D.all_reduce(x.abs().max(), "max", name))
        scale = amax_to_scale(largest, dtype)
        rounded = to_fp8_saturated(x.float() * scale, dtype)
        # As bytes: not every backend knows of float8.
        data = all_gather_parts(rounded.view(torch.uint8), name, size).view(dtype)
        return Float8TrainingTensor(data, scale, x.dtype, options, GemmInputRole.INPUT)

    @staticmethod
    def backward(ctx: Any, grad: Tensor) -> tuple[Tensor, None, None, None, None]:
        return reduce_scatter_sum(grad, *ctx.group), None, None, None, None
