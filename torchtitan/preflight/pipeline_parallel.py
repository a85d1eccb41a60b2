"""What can be wrong with the settings of pipeline parallelism. No torch."""

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
    plan_pipeline,
)

SIZE_KEY = "parallelism.pipeline_parallel_microbatch_size"
BATCH_KEY = "training.global_batch_size"


def check_static(context: RunContext) -> list[ConfigIssue]:
    """Problems of `parallelism.pipeline_*` and `module_fqns_per_model_part`; reads no file."""
    section = context.config.parallelism
    args = _model_args(context)
    if section.pipeline_parallel_degree == 1 or args is None:
        return []
    problems: list[ConfigIssue] = []
    if section.module_fqns_per_model_part and section.pipeline_parallel_split_points:
        problem = f"{NAMES_KEY} says the same in another way"
        problems.append(ConfigIssue(SPLIT_KEY, problem, "keep one of the two"))
    problems += _microbatch_size(context)
    if section.pipeline_parallel_schedule_csv:
        return problems  # the rest is for the probe, which knows what is in the file
    problems += _plan(context, args)
    if not problems:
        problems += [*_microbatches(context, args), *_split_backward(context)]
    return problems


def check_environment(context: RunContext) -> list[ConfigIssue]:
    """Problems of the schedule's file, and of a model that it does not fit."""
    section = context.config.parallelism
    args = _model_args(context)
    path = section.pipeline_parallel_schedule_csv
    if section.pipeline_parallel_degree == 1 or args is None or not path:
        return []
    problems = _plan(context, args)
    if problems:
        return problems
    degree = section.pipeline_parallel_degree
    if read_schedule(path, degree, context.pipeline_microbatches).splits_backward:
        problems += _split_backward_problems(context, CSV_KEY, path)
    return problems


def _model_args(context: RunContext) -> ModelArgs | None:
    """The model's hyper-parameters; None if the model's own check refuses them."""
    model = context.config.model
    try:
        args = get_family(model.name).resolve(model)
    except ConfigError:
        return None
    # The tokenizer's, if unset: it moves the balance, but makes no cut impossible.
    return args.model_copy(update={"vocab_size": args.vocab_size or 1})


def _plan(context: RunContext, args: ModelArgs) -> list[ConfigIssue]:
    try:
        plan_pipeline(context, args.modules())
    except ConfigError as error:
        return error.problems
    return []


def _microbatch_size(context: RunContext) -> list[ConfigIssue]:
    size = context.config.parallelism.pipeline_parallel_microbatch_size
    local = context.config.training.local_batch_size
    if local % size == 0:
        return []
    # Of numbers in practice; a slip of many digits must not take a search of as many steps.
    divisors = [n for n in range(1, min(local, size, 10_000) + 1) if local % n == 0]
    fix = f"set it to {' or '.join(map(str, divisors[-2:]))}, or training.local_batch_size to a"
    problem = f"does not divide training.local_batch_size = {local}"
    return [ConfigIssue(SIZE_KEY, problem, f"{fix} multiple of {size}", size)]


def _microbatches(context: RunContext, args: ModelArgs) -> Iterator[ConfigIssue]:
    """Whether a step has microbatches enough, in a number that the schedule can arrange."""
    section = context.config.parallelism
    schedule, degree = section.pipeline_parallel_schedule, section.pipeline_parallel_degree
    count, stages = (
        context.pipeline_microbatches,
        len(plan_pipeline(context, args.modules()).stages),
    )
    has = f"a step has {count} microbatch{'es' * (count > 1)} on each rank"
    needed = {"GPipe": 1, "DualPipeV": stages}.get(schedule, degree)
    if count < needed:
        problem = f"{has}, and {schedule} on {degree} pipeline ranks needs at least {needed}"
        yield _too_few(context, problem, needed)
    elif count < stages:
        problem = f"{has}, fewer than the pipeline's {stages} stages: ranks will often be idle"
        yield _too_few(context, problem, stages, severity="warning")
    if SCHEDULES[schedule].goes_in_rounds and not _fills_rounds(count, degree):
        reach = degree * _step(context)
        good = _possible(context, max(degree, count - reach), count + reach)
        nearest = [n for n in good if n < count][-1:] + [n for n in good if n > count][:1]
        sizes = " or ".join(str(_batch_size(context, n)) for n in nearest)
        problem = (
            f"{has}, and {schedule} takes them in {count // degree} rounds (that number divided by"
            f" {degree}, rounded down) of equal size"
        )
        yield ConfigIssue(BATCH_KEY, problem, f"set it to {sizes}", context.global_batch_size)


def _fills_rounds(count: int, degree: int) -> bool:
    return count % max(1, count // degree) == 0


def _step(context: RunContext) -> int:
    """Microbatches of a local batch: their number in a step is a multiple of it."""
    section = context.config.parallelism
    return context.config.training.local_batch_size // section.pipeline_parallel_microbatch_size


def _possible(context: RunContext, least: int, most: int) -> list[int]:
    """Numbers of microbatches that a batch can have and the schedule can arrange. Of as many
    multiples of `_step` in a row as there are ranks, one at least is among them."""
    section, step = context.config.parallelism, _step(context)
    degree = section.pipeline_parallel_degree
    rounds = SCHEDULES[section.pipeline_parallel_schedule].goes_in_rounds
    numbers = range(-(-least // step) * step, most + 1, step)
    return [n for n in numbers if not rounds or (n >= degree and _fills_rounds(n, degree))]


def _too_few(
    context: RunContext, problem: str, needed: int, severity: str = "error"
) -> ConfigIssue:
    degree = context.config.parallelism.pipeline_parallel_degree
    possible = _possible(context, needed, needed + 2 * degree * _step(context))[:2]
    sizes = " or ".join(str(_batch_size(context, number)) for number in possible)
    fix = f"set it to {sizes}, or to more"
    size = context.config.parallelism.pipeline_parallel_microbatch_size
    sequences = context.pipeline_microbatches * size
    local = context.config.training.local_batch_size
    smaller = [n for n in range(1, size) if local % n == 0 and sequences // n >= needed]
    if smaller:
        fix += f", or {SIZE_KEY} to {smaller[-1]}"
    return ConfigIssue(BATCH_KEY, problem, fix, context.global_batch_size, severity=severity)


def _batch_size(context: RunContext, microbatches: int) -> int:
    """The smallest global batch that gives each rank so many microbatches a step."""
    local = context.config.training.local_batch_size
    size = context.config.parallelism.pipeline_parallel_microbatch_size
    return math.ceil(microbatches * size / local) * local * context.dp_degree


def _split_backward(context: RunContext) -> list[ConfigIssue]:
    schedule = context.config.parallelism.pipeline_parallel_schedule
    if not SCHEDULES[schedule].splits_backward:
        return []
    return _split_backward_problems(context, SCHEDULE_KEY, schedule)


def _split_backward_problems(context: RunContext, key: str, value: str) -> list[ConfigIssue]:
    """What does not go with weights whose gradients come later than those of the inputs."""
    config = context.config
    found = []
    later = "computes the gradients of weights later than those of inputs, and"
    other = "or choose another schedule, such as Interleaved1F1B"
    if "compile" in config.model.handlers:
        problem = f"{later} compiled blocks compute both at once"
        found.append(
            ConfigIssue(key, problem, f'take "compile" out of model.handlers, {other}', value)
        )
    checkpoint = config.activation_checkpoint
    if checkpoint.mode == "selective" and checkpoint.selective_ac_option == "op":
        problem = f"{later} what activation checkpointing by operator keeps serves one of them only"
        fix = 'set activation_checkpoint.selective_ac_option to "2", or the mode to "full"'
        found.append(ConfigIssue(key, problem, f"{fix}, {other}", value))
    if config.parallelism.fsdp_reshard_after_forward == "always":
        problem = f"{later} needs the gathered weights until then"
        fix = 'set parallelism.fsdp_reshard_after_forward to "default"'
        found.append(ConfigIssue(key, problem, f"{fix}, {other}", value))
    return found
