"""Checks of pipeline parallelism."""

from collections.abc import Iterator
from importlib.metadata import version

from torchtitan.config.errors import ConfigError, ConfigIssue, warning
from torchtitan.config.run_context import RunContext
from torchtitan.models.registry import model_args
from torchtitan.models.spec import ModelArgs
from torchtitan.parallel.pipeline.schedules import CSV_KEY, SCHEDULES, read_schedule
from torchtitan.parallel.pipeline.stages import (
    NAMES_KEY,
    SCHEDULE_KEY,
    SPLIT_KEY,
    PipelinePlan,
    plan_pipeline,
)
from torchtitan.utils.text import plural

SIZE_KEY = "parallelism.pipeline_parallel_microbatch_size"
BATCH_KEY = "training.global_batch_size"


def check_static(context: RunContext) -> list[ConfigIssue]:
    """Return issues of the pipeline's keys; reads no file."""
    section, args = context.config.parallelism, model_args(context.config.model)
    if section.pipeline_parallel_degree == 1 or args is None:
        return []
    issues: list[ConfigIssue] = []
    if section.module_fqns_per_model_part and section.pipeline_parallel_split_points:
        problem = f"{NAMES_KEY} says the same in another way"
        issues.append(ConfigIssue(SPLIT_KEY, problem, "keep one of the two"))
    size = section.pipeline_parallel_microbatch_size
    local = context.config.training.local_batch_size
    if local % size:
        problem = f"does not divide training.local_batch_size = {local}"
        issues.append(ConfigIssue(SIZE_KEY, problem, "set it to 1 or to another divisor", size))
    if section.pipeline_parallel_schedule_csv:
        return issues  # check_environment reads the file
    try:
        stages = plan(context, args)
    except ConfigError as error:
        return issues + error.problems
    if not issues:
        issues += _microbatches(context, stages)
        schedule = section.pipeline_parallel_schedule
        if SCHEDULES[schedule].splits_backward:
            issues += _split_backward(context, SCHEDULE_KEY, schedule)
    return issues


def check_environment(context: RunContext) -> list[ConfigIssue]:
    """Return issues of the schedule's file, and of a model that it does not fit."""
    section, args = context.config.parallelism, model_args(context.config.model)
    path, count = section.pipeline_parallel_schedule_csv, context.pipeline_microbatches
    if section.pipeline_parallel_degree == 1 or args is None or not path:
        return []
    try:
        plan(context, args)
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


def plan(context: RunContext, args: ModelArgs) -> PipelinePlan:
    """Return the stages of the model."""
    # The tokenizer's size, if unset: it shifts the balance, and no split depends on it.
    sized = args.model_copy(update={"vocab_size": args.vocab_size or 1})
    return plan_pipeline(context.config.parallelism, sized.modules())


def _microbatches(context: RunContext, planned: PipelinePlan) -> Iterator[ConfigIssue]:
    """Return issues of the number of microbatches in a step."""
    section = context.config.parallelism
    schedule, degree = section.pipeline_parallel_schedule, section.pipeline_parallel_degree
    count, stages = context.pipeline_microbatches, len(planned.stages)
    has = f"a step has {plural(count, 'microbatch')} on each rank"
    needed = {"GPipe": 1, "DualPipeV": stages}.get(schedule, degree)
    fix = f"raise it, or lower {SIZE_KEY}"
    rounds = max(1, count // degree)
    if count < needed:
        problem = f"{has}, and {schedule} on {degree} pipeline ranks needs at least {needed}"
        yield ConfigIssue(BATCH_KEY, problem, fix, context.global_batch_size)
    elif count < stages:
        problem = f"{has}, fewer than the pipeline's {stages} stages: ranks will often be idle"
        yield warning(BATCH_KEY, problem, fix, context.global_batch_size)
    if SCHEDULES[schedule].goes_in_rounds and count % rounds:
        problem = f"{has}, and {schedule} needs a multiple of {rounds}, its number of rounds"
        fix = f"give each rank a multiple of {degree} microbatches"
        yield ConfigIssue(BATCH_KEY, problem, fix, context.global_batch_size)


def _split_backward(context: RunContext, key: str, value: str) -> Iterator[ConfigIssue]:
    """Return issues of a schedule that computes gradients of weights after those of inputs."""
    config, checkpoint = context.config, context.config.activation_checkpoint
    excluded = {
        "compiled blocks compute both at once": (
            "compile" in config.model.handlers,
            'take "compile" out of model.handlers',
        ),
        "activation checkpointing by operator keeps results for one of them only": (
            checkpoint.mode == "selective" and checkpoint.selective_ac_option == "op",
            'set activation_checkpoint.selective_ac_option to "2", or the mode to "full"',
        ),
        "needs the gathered weights until then": (
            config.parallelism.fsdp_reshard_after_forward == "always",
            'set parallelism.fsdp_reshard_after_forward to "default"',
        ),
        f"torch {version('torch')} has faults in that": (
            not torch_splits_backward(),
            "install torch 2.13 or newer",
        ),
    }
    for reason, (applies, fix) in excluded.items():
        if applies:
            problem = f"computes the gradients of weights later than those of inputs, and {reason}"
            fix += ", or choose another schedule, such as Interleaved1F1B"
            yield ConfigIssue(key, problem, fix, value)


def torch_splits_backward() -> bool:
    """Return whether this torch can compute the gradients of weights after those of inputs.

    Before 2.13 it fails on autograd functions there, or counts gradients twice.
    """
    return tuple(int(part) for part in version("torch").split(".")[:2]) >= (2, 13)
