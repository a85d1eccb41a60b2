"""Adjust defaults that do not fit what a config says otherwise."""

from collections.abc import Iterator
from typing import TypeVar

from torchtitan.config.errors import ConfigIssue
from torchtitan.config.schema import (
    DEFAULT_WARMUP,
    DataSource,
    JobConfig,
    Section,
    ValidationSet,
)

S = TypeVar("S", bound=Section)
_REASONS = {
    "training.local_batch_size": "{} do not divide a rank's share of the batch",
    "profiling.profile_freq": "{} steps are fewer than a trace takes with its warmup",
}


def fitted(config: JobConfig, dp_degree: int) -> JobConfig:
    """Return the config with the defaults of unset keys adjusted to the rest of it.

    They still count as unset. `dp_degree`: ranks that read different data.
    """
    config = with_document_mask(config)
    training, profiling = config.training, config.profiling
    share, rest = divmod(training.global_batch_size, dp_degree)
    if training.global_batch_size > 0 and not rest:
        unit = config.parallelism.pipeline_parallel_microbatch_size
        sizes = [n for n in range(1, _default(training, "local_batch_size") + 1) if share % n == 0]
        size = max((n for n in sizes if n % unit == 0), default=training.local_batch_size)
        training = _with_default(training, "local_batch_size", size)
    length = profiling.profiler_warmup + profiling.profiler_active
    profile_freq = max(length, _default(profiling, "profile_freq"))
    profiling = _with_default(profiling, "profile_freq", profile_freq)
    return config.model_copy(update={"training": training, "profiling": profiling})


def with_document_mask(config: JobConfig) -> JobConfig:
    """Return the config with `training.document_mask` on, if unset, where conversations need it.

    It is part of the run's identity, so it is set as soon as a config is loaded.
    """
    if not _has_conversations(config):
        return config
    training = _with_default(config.training, "document_mask", True)
    return config.model_copy(update={"training": training})


def notices(config: JobConfig, warmup_steps: int | None) -> Iterator[ConfigIssue]:
    """Yield a warning for each adjusted default.

    `config` is the result of `fitted`; `warmup_steps` is the meaning of an unset
    `lr_scheduler.warmup_steps`, if any.
    """
    schedule = config.lr_scheduler
    steps = schedule.length(config.training.steps)
    # With `decay_ratio` the warmup may be all that it leaves.
    rest = None if schedule.decay_ratio is None else steps - schedule.decay(steps)
    known = (None, DEFAULT_WARMUP, rest)
    if schedule.warmup_steps is None and warmup_steps not in known:
        reason = f"{DEFAULT_WARMUP} steps do not fit into the {steps} of the schedule"
        yield _notice("lr_scheduler.warmup_steps", warmup_steps, reason)
    for key, reason in _REASONS.items():
        table, _, name = key.rpartition(".")
        section = getattr(config, table)
        value, default = getattr(section, name), _default(section, name)
        if name not in section.model_fields_set and value != default:
            yield _notice(key, value, reason.format(default))


def _has_conversations(config: JobConfig) -> bool:
    """Return whether any data are conversations that have to be kept apart."""
    data = config.data
    tables: list[DataSource | ValidationSet] = [*data.sources]
    tables += config.validation.sets if config.validation.enable else ()
    formats = {data.format, *(table.format for table in tables)} - {"text", None}
    return bool(formats) and (data.packing or "preference" in formats)


def _notice(key: str, value: int | None, reason: str) -> ConfigIssue:
    problem = f"is unset, and {value} in this run, since {reason}"
    return ConfigIssue(key, problem, "set it to choose another value", severity="warning")


def _with_default(section: S, name: str, value: int | bool) -> S:
    """Return the section with another value of a key that is unset, and remains so."""
    if name in section.model_fields_set or getattr(section, name) == value:
        return section
    changed = section.model_copy(update={name: value})
    changed.model_fields_set.discard(name)
    return changed


def _default(section: Section, name: str) -> int:
    default = type(section).model_fields[name].default
    assert isinstance(default, int)
    return default
