"""Settings of the handler `float8`, and what can be wrong with them. No torch, but in `probe`."""

from collections.abc import Iterator
from typing import Literal

from torchtitan.config.errors import ConfigIssue
from torchtitan.config.run_context import RunContext
from torchtitan.config.schema import Names
from torchtitan.handlers.linear_settings import (
    LinearSettings,
    needs_capability,
    no_float64,
    whole_blocks,
)

AUTO_FILTER = "auto_filter_small_kn"
MULTIPLE = 16
_TABLE = "handlers.float8"
_ALL_GATHER = f"{_TABLE}.enable_fsdp_float8_all_gather"
_PRECOMPUTE = f"{_TABLE}.precompute_float8_dynamic_scale_for_fsdp"


class Settings(LinearSettings):
    """How linears are computed in float8."""

    recipe_name: Literal["tensorwise", "rowwise", "rowwise_with_gw_hp"] = "tensorwise"
    """What shares a scale: a whole tensor (the fastest), or a row, with scales that are powers of
    two (more accurate); `rowwise_with_gw_hp` also computes the gradients of weights in high
    precision."""

    filter_fqns: Names = ()
    """Linears whose full name contains one of these texts stay as they are;
    `auto_filter_small_kn` stands for those that torchao holds to be too small to gain."""

    enable_fsdp_float8_all_gather: bool = False
    """FSDP sends weights in float8, half the bytes; `tensorwise` only."""

    precompute_float8_dynamic_scale_for_fsdp: bool = False
    """Find the scales of all weights after the optimizer's step with one exchange, instead of one
    exchange for each weight when it is gathered."""

    emulate: bool = False
    """Multiply in float32 what was rounded to float8: for GPUs without float8. Slow."""


def check(context: RunContext, settings: Settings) -> Iterator[ConfigIssue]:
    """Problems of the settings together, and with the mesh and the batch."""
    if not settings.emulate:
        yield from no_float64(context, "float8")
        yield from _only_bfloat16(context, settings)
    if settings.recipe_name != "rowwise_with_gw_hp" and not settings.emulate:
        why = "float8 units take that many numbers at once"
        yield from whole_blocks(context, "float8", MULTIPLE, why)
    if settings.enable_fsdp_float8_all_gather:
        yield from _all_gather(context, settings)
    elif settings.precompute_float8_dynamic_scale_for_fsdp:
        problem = "the scales are those of weights that FSDP sends in float8, and none are"
        fix = f"set {_ALL_GATHER} to true, or this to false"
        yield ConfigIssue(_PRECOMPUTE, problem, fix, value=True)
    if settings.recipe_name == "rowwise_with_gw_hp" and AUTO_FILTER in settings.filter_fqns:
        problem = f"torchao has no figures for this recipe, by which {AUTO_FILTER} chooses"
        fix = f'leave "{AUTO_FILTER}" out, or choose another recipe'
        yield ConfigIssue(f"{_TABLE}.filter_fqns", problem, fix, value=AUTO_FILTER)


def _only_bfloat16(context: RunContext, settings: Settings) -> Iterator[ConfigIssue]:
    """What PyTorch's kernels say once they are called."""
    dtype = context.config.training.mixed_precision_param
    if (
        context.device_type == "cuda"
        and settings.recipe_name != "tensorwise"
        and dtype == "float32"
    ):
        problem = (
            f"products with a scale for each row ({settings.recipe_name}) come out in bfloat16"
        )
        fix = f'set it to "bfloat16", or {_TABLE}.recipe_name to "tensorwise"'
        yield ConfigIssue("training.mixed_precision_param", problem, fix, dtype)


def _all_gather(context: RunContext, settings: Settings) -> Iterator[ConfigIssue]:
    mesh = context.config.parallelism
    if settings.recipe_name != "tensorwise":
        problem = (
            f"a weight is sent with one scale, and {settings.recipe_name} has one for each row"
        )
        fix = f'set {_TABLE}.recipe_name to "tensorwise", or this to false'
        yield ConfigIssue(_ALL_GATHER, problem, fix, value=True)
    on_host = context.config.training.enable_cpu_offload and context.device_type != "cpu"
    if on_host and settings.precompute_float8_dynamic_scale_for_fsdp:
        problem = (
            "weights in host memory (training.enable_cpu_offload) lose their scales on the way to"
            " the device, where FSDP finds them anew"
        )
        yield ConfigIssue(_PRECOMPUTE, problem, "set it to false", value=True)
    shards = context.shard_degree * mesh.context_parallel_degree
    if mesh.data_parallel_replicate_degree > 1 and shards == 1:
        problem = "copies of the model without shards (DDP) gather no weights"
        fix = "set parallelism.data_parallel_shard_degree above 1 (HSDP), or this to false"
        yield ConfigIssue(_ALL_GATHER, problem, fix, value=True)


def probe(context: RunContext, settings: Settings) -> Iterator[ConfigIssue]:
    """Whether the GPU has float8 units; CPUs compute it slowly, but the same."""
    if not settings.emulate:
        instead = f"leave it out, or, to try it slowly, set {_TABLE}.emulate to true"
        yield from needs_capability(context, "float8", (8, 9), "Ada, Hopper", instead)
