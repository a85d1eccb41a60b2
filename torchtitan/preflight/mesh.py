"""Checks of the mesh and the batch against the number of processes."""

import os
from collections.abc import Iterator

from torchtitan.config import fitting
from torchtitan.config.errors import ConfigIssue, warning
from torchtitan.config.fields import unexpanded_paths
from torchtitan.config.run_context import RunContext
from torchtitan.utils.text import plural

_DEGREES = (
    "data_parallel_replicate_degree",
    "data_parallel_shard_degree",
    "context_parallel_degree",
    "tensor_parallel_degree",
    "pipeline_parallel_degree",
)


def check_static(context: RunContext) -> list[ConfigIssue]:
    """Check mesh, batch and paths; read no file."""
    issues = [*_mesh(context), *_threads(context)]
    if not issues:  # the batch is divided over a mesh, so there has to be one
        issues += _batch(context)
    return [
        *issues,
        *unexpanded_paths(context.config),
        *fitting.notices(context.config, context.warmup_steps),
    ]


def is_mesh(context: RunContext) -> bool:
    """Return whether the degrees make a mesh of the processes."""
    return not any(_mesh(context))


def _mesh(context: RunContext) -> Iterator[ConfigIssue]:
    mesh = context.config.parallelism
    shard, ranks = mesh.data_parallel_shard_degree, context.world_size
    key = "parallelism.data_parallel_shard_degree"
    fixed = mesh.data_parallel_replicate_degree * context.other_degrees
    others = f"degrees whose product divides {ranks}"
    fix = f"set {key} to -1, and the others to {others}"
    if shard == 0:
        yield ConfigIssue(key, "must be at least 1, or -1 for the rest", "set it to -1", shard)
    elif shard == -1 and ranks % fixed:
        count = plural(ranks, "process")
        text = f"{count} cannot be divided by {_product(context)} = {fixed}"
        fix = f"set {others}, or start a multiple of {fixed} processes (to check: WORLD_SIZE)"
        yield ConfigIssue(key, text, fix, shard)
    elif shard != -1 and fixed * shard != ranks:
        text = f"{_product(context)} = {fixed * shard}, but WORLD_SIZE = {ranks}"
        yield ConfigIssue("parallelism", text, f"{fix}, or start {fixed * shard} processes")


def _product(context: RunContext) -> str:
    """Return the product of the degrees that are not 1, in words."""
    mesh = context.config.parallelism
    factors = [(name, getattr(mesh, name)) for name in _DEGREES if getattr(mesh, name) != -1]
    shown = [f"{name} {degree}" for name, degree in factors if degree > 1] or ["all degrees 1"]
    return " x ".join(shown)


def _threads(context: RunContext) -> Iterator[ConfigIssue]:
    cores = os.cpu_count() or 1
    threads = context.config.debug.threads
    if context.full and threads > cores:
        text = f"this machine has {cores} core{'s' * (cores > 1)}"
        fix = f"set at most {cores}, or 0 to divide the cores among the processes"
        yield warning("debug.threads", text, fix, threads)


def _batch(context: RunContext) -> Iterator[ConfigIssue]:
    key, training = "training.global_batch_size", context.config.training
    value, local = training.global_batch_size, training.local_batch_size
    unit = local * context.dp_degree
    if value == 0:
        text = "must be at least 1, or -1 for one microbatch a rank"
        yield ConfigIssue(key, text, "set -1", value)
    elif context.global_batch_size % unit:
        product = f"training.local_batch_size x data-parallel degree = {local} x"
        text = f"is not a multiple of {product} {context.dp_degree} = {unit}"
        fix = f"set it to a multiple, such as {unit * (context.global_batch_size // unit + 1)}"
        yield ConfigIssue(key, text, fix, value)
