"""The handler `float8`: linears that multiply 8-bit floating point numbers.

torchao's `Float8Linear` rounds input, weight and output gradient as it multiplies them; parameters
and the optimizer stay in high precision. Numbers are scaled first so that the largest one that
shares the scale just fits.

With `enable_fsdp_float8_all_gather` the parameters are of a torchao tensor class that lets FSDP
send the rounded weight, with the scale of the whole weight.

With tensor parallelism a linear multiplies its shard of the matrix and needs nothing for it, but
its input, a sequence, is gathered first. With the recipe `tensorwise` an input has one scale: each
rank rounds its part by the largest number of all parts and sends half the bytes. The linears get
exactly the numbers that they would have rounded themselves. Gradients return in high precision.
"""

from collections.abc import Collection
from dataclasses import replace
from functools import cache
from typing import Any

import torch
from torch import Tensor, nn
from torch.distributed.tensor import Shard
from torchao.float8 import (
    Float8LinearConfig,
    _auto_filter_for_recipe,
    convert_to_float8_training,
    precompute_float8_dynamic_scale_for_fsdp,
)
from torchao.float8.float8_training_tensor import (
    Float8TrainingTensor,
    GemmInputRole,
    LinearMMConfig,
)
from torchao.float8.float8_utils import amax_to_scale, to_fp8_saturated

from torchtitan.config import ConfigError, ConfigIssue, JobConfig
from torchtitan.distributed.parallel_dims import ParallelDims
from torchtitan.handlers.linears import LinearHandler
from torchtitan.handlers.settings import AUTO_FILTER, FLOAT8_MULTIPLE
from torchtitan.parallel.tensor_parallel import (
    CutModule,
    GatherInput,
    ParallelStyle,
    all_gather_parts,
    reduce_scatter_sum,
)

_C10D = torch.ops._c10d_functional


class Float8Handler(LinearHandler):
    """Swaps linears for torchao's, and keeps the scales that FSDP needs."""

    name = "float8"
    multiple = FLOAT8_MULTIPLE
    keywords = (AUTO_FILTER,)

    def __init__(self, job_config: JobConfig, parallel_dims: ParallelDims):
        super().__init__(job_config, parallel_dims)
        chosen = self.settings
        self.config = replace(
            Float8LinearConfig.from_recipe_name(chosen.recipe_name),
            enable_fsdp_float8_all_gather=chosen.enable_fsdp_float8_all_gather,
            emulate=chosen.emulate,
        )
        self._is_large = None
        self._options: LinearMMConfig | None = None
        if AUTO_FILTER in chosen.filter_fqns:
            self._is_large = _auto_filter_for_recipe(chosen.recipe_name, filter_fqns=[])

    def leaves_out(self, name: str, linear: nn.Linear) -> bool:
        """Leave out linears that torchao considers too small."""
        fits = not (linear.in_features % FLOAT8_MULTIPLE or linear.out_features % FLOAT8_MULTIPLE)
        return fits and self._is_large is not None and not self._is_large(linear, name)

    def swap(self, name: str, linear: nn.Linear) -> nn.Linear:
        """Return a `Float8Linear` with the same parameters."""
        if self.config.enable_fsdp_float8_all_gather:
            self._require_even_shards(name, linear.out_features)
        swapped = convert_to_float8_training(linear, config=self.config)
        self._options = swapped.linear_mm_config
        return swapped

    def extend_tp_plan(self, plan: dict[str, ParallelStyle]) -> None:
        """Gather in float8 the inputs that linears would round by one scale anyway."""
        super().extend_tp_plan(plan)
        if self.config.enable_fsdp_float8_all_gather:
            for name in (name for name in plan if name in self.swapped):
                rows, is_cut = self.swapped[name][0], plan[name].placement == Shard(0)
                self._require_even_shards(name, rows // self.dims.tp if is_cut else rows)
        if self.settings.recipe_name == "tensorwise":
            assert self._options is not None, "nothing was converted"
            dtype = self.config.cast_config_input.target_dtype
            gather_in_float8(plan, self.swapped, self._options, dtype)

    def after_load(self, model: nn.Module | list[nn.Module]) -> None:
        """Compute the scales as after a step, so that a resumed run has the same ones.

        FSDP itself would compute one for each tensor-parallel shard of a matrix.
        """
        self.post_optimizer_hook(model)

    def post_optimizer_hook(self, model: nn.Module | list[nn.Module]) -> None:
        """Compute the scales of all new weights at once."""
        if self.settings.precompute_float8_dynamic_scale_for_fsdp:
            for part in model if isinstance(model, list) else [model]:
                precompute_float8_dynamic_scale_for_fsdp(part)

    def _require_even_shards(self, name: str, rows: int) -> None:
        """Refuse uneven shards: torchao sends no padding, and finds no scale for an empty one."""
        if rows % self.dims.shards:
            problem = (
                f"FSDP sends equal parts only, and the {rows} rows of {name} cannot be shared out"
                f" over {self.dims.shards} ranks"
            )
            fix = "set it to false, or parallelism.data_parallel_replicate_degree higher"
            key = "handlers.float8.enable_fsdp_float8_all_gather"
            raise ConfigError(ConfigIssue(key, problem, fix, value=True))


def gather_in_float8(
    plan: dict[str, ParallelStyle],
    swapped: Collection[str],
    options: LinearMMConfig,
    dtype: torch.dtype,
) -> None:
    """Change, in `plan`, how modules gather an input that only `swapped` linears take.

    These round it to `dtype` and multiply with `options`.
    """
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
    """Return one class for all modules, so that the compiler sees equal blocks."""
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
