"""Checks of pipeline parallelism."""

import math
from collections.abc import Iterator

from torchtitan.config.errors import ConfigError, ConfigIssue
from torchtitan.config.run_context import RunContext
from torchtitan.models.registry import get_family
from torchtitan.models.spec import ModelArgs
from torchtitan.parallel.pipeline.schedules import CSV_KEY, SCHEDULES, read_schedule
from torchtitan.parallel.pipeline.stages import (
    NAMES_KEY,
    SCHEDULE_KEY,
    SPLIT_KEY,
    PipelinePlan,
    plan_pipeline,
)

SIZE_KEY = "parallelism.pipeline_parallel_microbatch_size"
BATCH_KEY = "training.global_batch_size"


def check_static(context: RunContext) -> list[ConfigIssue]:
    """Return problems of the pipeline's keys; reads no file."""
    section, args = context.config.parallelism, _model_args(context)
    if section.pipeline_parallel_degree == 1 or args is None:
        return []
    problems: list[ConfigIssue] = []
    if section.module_fqns_per_model_part and section.pipeline_parallel_split_points:
        problem = f"{NAMES_KEY} says the same in another way"
        problems.append(ConfigIssue(SPLIT_KEY, problem, "keep one of the two"))
    size, local = (
        section.pipeline_parallel_microbatch_size,
        context.config.training.local_batch_size,
    )
    if local % size:
        problem = f"does not divide training.local_batch_size = {local}"
        problems.append(ConfigIssue(SIZE_KEY, problem, "set it to 1 or to another divisor", size))
    if section.pipeline_parallel_schedule_csv:
        return problems  # check_environment reads the file
    try:
        plan = plan_pipeline(section, args.modules())
    except ConfigError as error:
        return problems + error.problems
    if not problems:
        problems += _microbatches(context, plan)
        schedule = section.pipeline_parallel_schedule
        if SCHEDULES[schedule].splits_backward:
            problems += _split_backward(context, SCHEDULE_KEY, schedule)
    return problems


def check_environment(context: RunContext) -> list[ConfigIssue]:
    """Return problems of the schedule's file, and of a model that it does not fit."""
    section, args = context.config.parallelism, _model_args(context)
    path, count = section.pipeline_parallel_schedule_csv, context.pipeline_microbatches
    if section.pipeline_parallel_degree == 1 or args is None or not path:
        return []
    try:
        plan_pipeline(section, args.modules())
        _, splits_backward = read_schedule(path, section.pipeline_parallel_degree)
    except ConfigError as error:
        return error.problems
    from torchtitan.utils.torch_compat import require_runnable_schedule

    try:
        require_runnable_schedule(path, count)
    except ValueError as error:
        problem = (
            f"cannot run a step's {count} microbatches (sequences of a rank and step /"
            f" {SIZE_KEY}): {error}"
        )
        return [ConfigIssue(CSV_KEY, problem, "correct the file", path)]
    return list(_split_backward(context, CSV_KEY, path)) if splits_backward else []


def _model_args(context: RunContext) -> ModelArgs | None:
    """Return the model's hyper-parameters; None if the model's own check rejects them."""
    model = context.config.model
    try:
        args = get_family(model.name).resolve(model)
    except ConfigError:
        return None
    # The tokenizer's size, if unset: it shifts the balance, and no split depends on it.
    return args.model_copy(update={"vocab_size": args.vocab_size or 1})


def _microbatches(context: RunContext, plan: PipelinePlan) -> Iterator[ConfigIssue]:
    """Return problems of the number of microbatches in a step."""
    section = context.config.parallelism
    schedule, degree = section.pipeline_parallel_schedule, section.pipeline_parallel_degree
    count, stages = context.pipeline_microbatches, len(plan.stages)
    has = f"a step has {count} microbatch{'es' * (count > 1)} on each rank"
    needed = {"GPipe": 1, "DualPipeV": stages}.get(schedule, degree)
    if count < stages:
        wanted, severity = (needed, "error") if count < needed else (stages, "warning")
        problem = f"{has}, and {schedule} on {degree} pipeline ranks needs at least {needed}"
        if severity == "warning":
            problem = f"{has}, fewer than the pipeline's {stages} stages: ranks will often be idle"
        fix = f"set it to {_batch_size(context, wanted)} or more, or {SIZE_KEY} to less"
        yield ConfigIssue(BATCH_KEY, problem, fix, context.global_batch_size, severity=severity)
    rounds = max(1, count // degree)
    if SCHEDULES[schedule].goes_in_rounds and count % rounds:
        problem = f"{has}, and {schedule} needs a multiple of {rounds}, its number of rounds"
        fix = f"set it to {_batch_size(context, count)}"
        yield ConfigIssue(BATCH_KEY, problem, fix, context.global_batch_size)


def _batch_size(context: RunContext, microbatches: int) -> int:
    """Return the smallest global batch with at least so many microbatches on each rank.

    Their number is a multiple of the pipeline's degree, which suits every schedule.
    """
    section = context.config.parallelism
    local, size = (
        context.config.training.local_batch_size,
        section.pipeline_parallel_microbatch_size,
    )
    step = math.lcm(local // size, section.pipeline_parallel_degree)
    return -(-microbatches // step) * step * size * context.dp_degree


def _split_backward(context: RunContext, key: str, value: str) -> Iterator[ConfigIssue]:
    """Return problems of a schedule that computes gradients of weights after those of inputs."""
    config = context.config
    later = "computes the gradients of weights later than those of inputs, and"
    other = "or choose another schedule, such as Interleaved1F1B"
    if "compile" in config.model.handlers:
        problem = f"{later} compiled blocks compute both at once"
        yield ConfigIssue(key, problem, f'take "compile" out of model.handlers, {other}', value)
    checkpoint = config.activation_checkpoint
    if checkpoint.mode == "selective" and checkpoint.selective_ac_option == "op":
        problem = f"{later} activation checkpointing by operator keeps results for one of them only"
        fix = 'set activation_checkpoint.selective_ac_option to "2", or the mode to "full"'
        yield ConfigIssue(key, problem, f"{fix}, {other}", value)
    if config.parallelism.fsdp_reshard_after_forward == "always":
        problem = f"{later} needs the gathered weights until then"
        fix = 'set parallelism.fsdp_reshard_after_forward to "default"'
        yield ConfigIssue(key, problem, f"{fix}, {other}", value)
