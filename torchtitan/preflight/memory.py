"""Checks of the settings that save memory. No torch."""

import math
from collections.abc import Iterator

from torchtitan.config.errors import ConfigIssue, warning
from torchtitan.config.run_context import RunContext

OFFLOAD_KEY = "training.enable_cpu_offload"
EARLY_STEP_KEY = "optimizer.early_step_in_backward"
MICROBATCH_KEY = "parallelism.pipeline_parallel_microbatch_size"
MODE_KEY = "activation_checkpoint.mode"
ACTIVATIONS_KEY = "activation_checkpoint.offload"
_PARTITIONING_BACKENDS = ("inductor", "aot_eager")
"""Backends of `compile` that choose what the backward finds and what it computes again."""


def check_static(context: RunContext) -> list[ConfigIssue]:
    """Return issues of settings that do not fit together; reads no file."""
    return [*_offload(context), *_early_step(context), *_memory_budget(context)]


def _offload(context: RunContext) -> Iterator[ConfigIssue]:
    config = context.config
    copies = config.parallelism.data_parallel_replicate_degree
    shards = context.shard_degree * config.parallelism.context_parallel_degree
    if config.training.enable_cpu_offload and copies > 1 and shards == 1:
        problem = f"FSDP does it, and {copies} copies of the model without shards are DDP"
        fix = "set parallelism.data_parallel_shard_degree above 1 (HSDP), or this to false"
        yield ConfigIssue(OFFLOAD_KEY, problem, fix, True)
    for key, is_set in (
        (OFFLOAD_KEY, config.training.enable_cpu_offload),
        (ACTIVATIONS_KEY, config.activation_checkpoint.offload),
    ):
        if is_set and context.device_type == "cpu":
            problem = "a run on CPUs has everything in host memory already: it only costs copies"
            yield warning(key, problem, "use it with CUDA, or set it to false", True)


def _early_step(context: RunContext) -> Iterator[ConfigIssue]:
    """Return the settings that need all gradients of a step before a parameter changes."""
    config = context.config
    if not config.optimizer.early_step_in_backward:
        return
    off = f"or set {EARLY_STEP_KEY} to false"
    max_norm = config.training.max_norm
    if not math.isinf(max_norm):
        problem = "clipping needs the norm of all gradients before the first of them is used"
        yield ConfigIssue("training.max_norm", problem, f"set it to inf, {off}", max_norm)
    for key in ("on_non_finite", "on_loss_spike"):
        if getattr(config.training, key) == "skip":
            problem = "a parameter has changed before the loss and the norm of the step are known"
            yield ConfigIssue(f"training.{key}", problem, f"do not skip, {off}", "skip")
    pipeline = config.parallelism.pipeline_parallel_degree > 1
    count = context.pipeline_microbatches if pipeline else context.accumulation_steps
    if count > 1:
        problem = f"a step adds up the gradients of {count} microbatches, so nothing is saved"
        fix = "let a step have one (training.global_batch_size"
        if pipeline:  # all schedules but GPipe need more than one
            fix += f', {MICROBATCH_KEY}, pipeline_parallel_schedule = "GPipe"'
        yield ConfigIssue(EARLY_STEP_KEY, problem, f"{fix}), or set it to false", True)


def _memory_budget(context: RunContext) -> Iterator[ConfigIssue]:
    config = context.config
    if config.activation_checkpoint.mode != "memory_budget":
        return
    other = f'or set {MODE_KEY} to "selective"'
    backend = config.handlers.get("compile", {}).get("backend", "inductor")
    if "compile" not in config.model.handlers:
        problem = "the compiler chooses what is recomputed, and blocks are not compiled"
        fix = f'set model.handlers = ["compile"], {other}'
        yield ConfigIssue(MODE_KEY, problem, fix, "memory_budget")
    elif backend not in _PARTITIONING_BACKENDS:
        problem = f"the backend {backend} does not choose what is recomputed"
        fix = f'set handlers.compile.backend to "inductor", {other}'
        yield ConfigIssue(MODE_KEY, problem, fix, "memory_budget")
