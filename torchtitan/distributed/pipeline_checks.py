"""What can be wrong with the settings of pipeline parallelism. No torch."""

import math
from collections.abc import Iterator

from torchtitan.config.errors import ConfigError, Problem
from torchtitan.config.facts import Facts
from torchtitan.distributed.pipeline_cut import (
    NAMES_KEY,
    SCHEDULE_KEY,
    SPLIT_KEY,
    plan_pipeline,
)
from torchtitan.distributed.pipeline_schedule import CSV_KEY, SCHEDULES, read_schedule
from torchtitan.models.registry import get_family
from torchtitan.models.spec import ModelArgs

SIZE_KEY = "parallelism.pipeline_parallel_microbatch_size"
BATCH_KEY = "training.global_batch_size"


def check(facts: Facts) -> list[Problem]:
    """Problems of `parallelism.pipeline_*` and `module_fqns_per_model_part`; reads no file."""
    section = facts.config.parallelism
    args = _model_args(facts)
    if section.pipeline_parallel_degree == 1 or args is None:
        return []
    problems = args.pipeline_parallel_problems(section.pipeline_parallel_degree)
    if section.module_fqns_per_model_part and section.pipeline_parallel_split_points:
        problem = f"{NAMES_KEY} says the same in another way"
        problems.append(Problem(SPLIT_KEY, problem, "keep one of the two"))
    problems += _microbatch_size(facts)
    if section.pipeline_parallel_schedule_csv:
        return problems  # the rest is for the probe, which knows what is in the file
    problems += _plan(facts, args)
    if not problems:
        problems += [*_microbatches(facts, args), *_split_backward(facts)]
    return problems


def probe(facts: Facts) -> list[Problem]:
    """Problems of the schedule's file, and of a model that it does not fit."""
    section = facts.config.parallelism
    args = _model_args(facts)
    path = section.pipeline_parallel_schedule_csv
    if section.pipeline_parallel_degree == 1 or args is None or not path:
        return []
    problems = _plan(facts, args)
    if problems:
        return problems
    degree = section.pipeline_parallel_degree
    if read_schedule(path, degree, facts.pipeline_microbatches).splits_backward:
        problems += _split_backward_problems(facts, CSV_KEY, path)
    return problems


def _model_args(facts: Facts) -> ModelArgs | None:
    """The model's hyper-parameters; None if the model's own check refuses them."""
    model = facts.config.model
    try:
        args = get_family(model.name).resolve(model)
    except ConfigError:
        return None
    # The tokenizer's, if unset: it moves the balance, but makes no cut impossible.
    return args.model_copy(update={"vocab_size": args.vocab_size or 1})


def _plan(facts: Facts, args: ModelArgs) -> list[Problem]:
    try:
        plan_pipeline(facts, args.modules())
    except ConfigError as error:
        return error.problems
    return []


def _microbatch_size(facts: Facts) -> list[Problem]:
    size = facts.config.parallelism.pipeline_parallel_microbatch_size
    local = facts.config.training.local_batch_size
    if local % size == 0:
        return []
    # Of numbers in practice; a slip of many digits must not take a search of as many steps.
    divisors = [n for n in range(1, min(local, size, 10_000) + 1) if local % n == 0]
    fix = f"set it to {' or '.join(map(str, divisors[-2:]))}, or training.local_batch_size to a"
    problem = f"does not divide training.local_batch_size = {local}"
    return [Problem(SIZE_KEY, problem, f"{fix} multiple of {size}", size)]


def _microbatches(facts: Facts, args: ModelArgs) -> Iterator[Problem]:
    """Whether a step has microbatches enough, in a number that the schedule can arrange."""
    section = facts.config.parallelism
    schedule, degree = section.pipeline_parallel_schedule, section.pipeline_parallel_degree
    count, stages = facts.pipeline_microbatches, len(plan_pipeline(facts, args.modules()).stages)
    has = f"a step has {count} microbatch{'es' * (count > 1)} on each rank"
    needed = {"GPipe": 1, "DualPipeV": stages}.get(schedule, degree)
    if count < needed:
        problem = f"{has}, and {schedule} on {degree} pipeline ranks needs at least {needed}"
        yield _too_few(facts, problem, needed)
    elif count < stages:
        problem = f"{has}, fewer than the pipeline's {stages} stages: ranks will often be idle"
        yield _too_few(facts, problem, stages, severity="warning")
    if SCHEDULES[schedule].goes_in_rounds and not _fills_rounds(count, degree):
        reach = degree * _step(facts)
        good = _possible(facts, max(degree, count - reach), count + reach)
        nearest = [n for n in good if n < count][-1:] + [n for n in good if n > count][:1]
        sizes = " or ".join(str(_batch_size(facts, n)) for n in nearest)
        problem = (
            f"{has}, and {schedule} takes them in {count // degree} rounds (that number divided by"
            f" {degree}, rounded down) of equal size"
        )
        yield Problem(BATCH_KEY, problem, f"set it to {sizes}", facts.global_batch_size)


def _fills_rounds(count: int, degree: int) -> bool:
    return count % max(1, count // degree) == 0


def _step(facts: Facts) -> int:
    """Microbatches of a local batch: their number in a step is a multiple of it."""
    section = facts.config.parallelism
    return facts.config.training.local_batch_size // section.pipeline_parallel_microbatch_size


def _possible(facts: Facts, least: int, most: int) -> list[int]:
    """Numbers of microbatches that a batch can have and the schedule can arrange. Of as many
    multiples of `_step` in a row as there are ranks, one at least is among them."""
    section, step = facts.config.parallelism, _step(facts)
    degree = section.pipeline_parallel_degree
    rounds = SCHEDULES[section.pipeline_parallel_schedule].goes_in_rounds
    numbers = range(-(-least // step) * step, most + 1, step)
    return [n for n in numbers if not rounds or (n >= degree and _fills_rounds(n, degree))]


def _too_few(facts: Facts, problem: str, needed: int, severity: str = "error") -> Problem:
    degree = facts.config.parallelism.pipeline_parallel_degree
    possible = _possible(facts, needed, needed + 2 * degree * _step(facts))[:2]
    sizes = " or ".join(str(_batch_size(facts, number)) for number in possible)
    fix = f"set it to {sizes}, or to more"
    size = facts.config.parallelism.pipeline_parallel_microbatch_size
    sequences = facts.pipeline_microbatches * size
    local = facts.config.training.local_batch_size
    smaller = [n for n in range(1, size) if local % n == 0 and sequences // n >= needed]
    if smaller:
        fix += f", or {SIZE_KEY} to {smaller[-1]}"
    return Problem(BATCH_KEY, problem, fix, facts.global_batch_size, severity=severity)


def _batch_size(facts: Facts, microbatches: int) -> int:
    """The smallest global batch that gives each rank so many microbatches a step."""
    local = facts.config.training.local_batch_size
    size = facts.config.parallelism.pipeline_parallel_microbatch_size
    return math.ceil(microbatches * size / local) * local * facts.dp_degree


def _split_backward(facts: Facts) -> list[Problem]:
    schedule = facts.config.parallelism.pipeline_parallel_schedule
    if not SCHEDULES[schedule].splits_backward:
        return []
    return _split_backward_problems(facts, SCHEDULE_KEY, schedule)


def _split_backward_problems(facts: Facts, key: str, value: str) -> list[Problem]:
    """What does not go with weights whose gradients come later than those of the inputs."""
    config = facts.config
    found = []
    later = "computes the gradients of weights later than those of inputs, and"
    other = "or choose another schedule, such as Interleaved1F1B"
    if "compile" in config.model.handlers:
        problem = f"{later} compiled blocks compute both at once"
        found.append(Problem(key, problem, f'take "compile" out of model.handlers, {other}', value))
    checkpoint = config.activation_checkpoint
    if checkpoint.mode == "selective" and checkpoint.selective_ac_option == "op":
        problem = f"{later} what activation checkpointing by operator keeps serves one of them only"
        fix = 'set activation_checkpoint.selective_ac_option to "2", or the mode to "full"'
        found.append(Problem(key, problem, f"{fix}, {other}", value))
    if config.parallelism.fsdp_reshard_after_forward == "always":
        problem = f"{later} needs the gathered weights until then"
        fix = 'set parallelism.fsdp_reshard_after_forward to "default"'
        found.append(Problem(key, problem, f"{fix}, {other}", value))
    return found
