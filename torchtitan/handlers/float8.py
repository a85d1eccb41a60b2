"""The handler `float8`: linears whose products are of 8-bit floating point numbers.

torchao's `Float8Linear` rounds input, weight and output gradient as it multiplies them; parameters,
and the optimizer, stay in high precision. A number is multiplied by a scale first, so that the
largest that shares the scale just fits.

With `enable_fsdp_float8_all_gather` the parameters are tensors of a class of torchao's, which FSDP
asks what to send: the rounded weight, with the scale that the largest of all shards asks for.
"""

from dataclasses import replace

from torch import nn
from torch.distributed.tensor import Shard
from torchao.float8 import (
    Float8LinearConfig,
    _auto_filter_for_recipe,
    convert_to_float8_training,
    precompute_float8_dynamic_scale_for_fsdp,
)
from torchao.float8.float8_training_tensor import LinearMMConfig

from torchtitan.config import ConfigError, ConfigIssue, JobConfig
from torchtitan.distributed.parallel_dims import ParallelDims
from torchtitan.handlers.float8_settings import AUTO_FILTER, MULTIPLE
from torchtitan.handlers.float8_tensor_parallel import gather_in_float8
from torchtitan.handlers.linears import LinearHandler
from torchtitan.parallel.tensor_parallel import ParallelStyle


class Float8Handler(LinearHandler):
    """Swaps linears for torchao's, and looks after the scales that FSDP needs."""

    name = "float8"
    multiple = MULTIPLE
    marks = (AUTO_FILTER,)

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
        """What torchao holds to be too small; what does not fit at all is counted elsewhere."""
        fits = linear.in_features % MULTIPLE == 0 and linear.out_features % MULTIPLE == 0
        return fits and self._is_large is not None and not self._is_large(linear, name)

    def swap(self, name: str, linear: nn.Linear) -> nn.Linear:
        """A `Float8Linear` with the same parameters."""
        if self.config.enable_fsdp_float8_all_gather:
            self._require_even_shards(name, linear.out_features)
        swapped = convert_to_float8_training(linear, config=self.config)
        self._options = swapped.linear_mm_config
        return swapped

    def extend_tp_plan(self, plan: dict[str, ParallelStyle]) -> None:
        """Gather in float8 the inputs of linears that would round them by one scale anyway."""
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
        """As after a step, so that a resumed run has the same scales as one that was not stopped:
        FSDP itself would find one for each part that tensor parallelism makes of a matrix."""
        self.post_optimizer_hook(model)

    def post_optimizer_hook(self, model: nn.Module | list[nn.Module]) -> None:
        """The scales of the new weights, of all at once."""
        if self.settings.precompute_float8_dynamic_scale_for_fsdp:
            for part in model if isinstance(model, list) else [model]:
                precompute_float8_dynamic_scale_for_fsdp(part)

    def _require_even_shards(self, name: str, rows: int) -> None:
        """torchao sends no padding, and finds no scale where nothing is."""
        if rows % self.dims.shards:
            problem = (
                f"FSDP sends equal parts only, and the {rows} rows of {name} cannot be shared out"
                f" over {self.dims.shards} ranks"
            )
            fix = "set it to false, or parallelism.data_parallel_replicate_degree higher"
            key = "handlers.float8.enable_fsdp_float8_all_gather"
            raise ConfigError(ConfigIssue(key, problem, fix, value=True))
