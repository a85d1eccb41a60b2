"""Checks of the mesh and the batch against the number of processes."""

import os
from collections.abc import Iterable, Iterator
from typing import Any

from torchtitan.config import fitting
from torchtitan.config.errors import ConfigIssue
from torchtitan.config.fields import Key, keys_of, known_keys
from torchtitan.config.paths import why_unexpanded
from torchtitan.config.run_context import RunContext
from torchtitan.config.schema import JobConfig

_DEGREES = (
    "data_parallel_replicate_degree",
    "data_parallel_shard_degree",
    "context_parallel_degree",
    "tensor_parallel_degree",
    "pipeline_parallel_degree",
)


def check_static(context: RunContext) -> list[ConfigIssue]:
    """Everything that arithmetic on the config and the world size can find. Reads no file."""
    problems = [*_mesh(context), *_threads(context)]
    if not problems:  # the batch is divided over a mesh, so there has to be one
        problems += _batch(context)
    return [
        *problems,
        *_paths(context.config),
        *fitting.notices(context.config, context.warmup_steps),
    ]


def is_mesh(context: RunContext) -> bool:
    """Whether the degrees make a mesh of the processes."""
    return not any(_mesh(context))


def _mesh(context: RunContext) -> Iterator[ConfigIssue]:
    mesh = context.config.parallelism
    shard, replicate = mesh.data_parallel_shard_degree, mesh.data_parallel_replicate_degree
    key = "parallelism.data_parallel_shard_degree"
    fixed = replicate * context.other_degrees
    if shard == 0:
        yield ConfigIssue(key, "must be at least 1, or -1 for the rest", "set it to -1", shard)
    elif shard == -1 and context.world_size % fixed:
        yield ConfigIssue(
            key,
            f"{context.world_size} processes cannot be divided by {_product(context)} = {fixed}",
            f"{_mesh_fix(context)}, or start a multiple of {fixed} processes",
            shard,
        )
    elif shard != -1 and fixed * shard != context.world_size:
        yield ConfigIssue(
            "parallelism",
            f"{_product(context)} = {fixed * shard}, but WORLD_SIZE = {context.world_size}",
            f"{_mesh_fix(context)}, or start {fixed * shard} processes",
        )


def _mesh_fix(context: RunContext) -> str:
    """The least that makes a mesh of these processes: degrees of data parallelism, if they can."""
    mesh, world_size, other = context.config.parallelism, context.world_size, context.other_degrees
    if world_size % other:
        return f"choose tensor, context and pipeline degrees whose product divides {world_size}"
    rest, remainder = divmod(world_size, other * mesh.data_parallel_replicate_degree)
    if remainder == 0:
        return f"set data_parallel_shard_degree = -1 (which would be {rest})"
    copies = f"data_parallel_replicate_degree to {_listed(_divisors(world_size // other))}"
    if mesh.data_parallel_shard_degree == -1:
        return f"set {copies}"
    return f"set data_parallel_shard_degree to -1 and {copies}"


def _product(context: RunContext) -> str:
    """The degrees that count, as a product in words."""
    mesh = context.config.parallelism
    factors = [(name, getattr(mesh, name)) for name in _DEGREES if getattr(mesh, name) != -1]
    shown = [f"{name} {degree}" for name, degree in factors if degree > 1] or ["all degrees 1"]
    return " x ".join(shown)


def _paths(config: JobConfig) -> Iterator[ConfigIssue]:
    """Paths with a variable that is not set: they would name a folder called `$NAME`."""
    for name, path in paths_of(config):
        reason = why_unexpanded(path)
        if reason:
            fix = "set it where the run starts, or write the folder itself"
            yield ConfigIssue(name, reason, fix, path, missing_asset=True)


def paths_of(config: JobConfig) -> Iterator[tuple[str, str]]:
    """The dotted name and value of every path that a config sets, or that has a default."""
    return _paths_in(config.model_dump(), known_keys().values(), "")


def _paths_in(table: Any, keys: Iterable[Key], prefix: str) -> Iterator[tuple[str, str]]:
    for key in keys:
        value = table
        for part in key.name.split("."):
            value = value[part]
        if key.is_path and value:
            yield prefix + key.name, value
        for index, inner in enumerate(value if key.item else ()):
            assert key.item is not None
            yield from _paths_in(inner, keys_of(key.item), f"{prefix}{key.name}[{index}].")


def _threads(context: RunContext) -> Iterator[ConfigIssue]:
    cores = os.cpu_count() or 1
    threads = context.config.debug.threads
    if context.full and threads > cores:
        problem = f"this machine has {cores} cores"
        fix = f"set at most {cores}, or 0 to divide the cores among the processes"
        yield ConfigIssue("debug.threads", problem, fix, threads, severity="warning")


def _batch(context: RunContext) -> Iterator[ConfigIssue]:
    training = context.config.training
    value = training.global_batch_size
    key = "training.global_batch_size"
    if value == 0:
        yield ConfigIssue(
            key, "must be at least 1, or -1 for one microbatch a rank", "set -1", value
        )
        return
    unit = training.local_batch_size * context.dp_degree
    if context.global_batch_size % unit:
        below = context.global_batch_size // unit * unit
        nearest = [str(size) for size in (below, below + unit) if size > 0]
        share, rest = divmod(context.global_batch_size, context.dp_degree)
        smaller = [n for n in _divisors(share) if n < training.local_batch_size] if not rest else []
        local = f"training.local_batch_size to {smaller[-1]}" if smaller else "the mesh"
        yield ConfigIssue(
            key,
            "is not a multiple of training.local_batch_size x data-parallel degree = "
            f"{training.local_batch_size} x {context.dp_degree} = {unit}",
            f"set it to {' or '.join(nearest)}, or change {local}",
            value,
        )


def _divisors(number: int) -> list[int]:
    small = [n for n in range(1, int(number**0.5) + 1) if number % n == 0]
    return sorted({*small, *(number // n for n in small)})


def _listed(numbers: list[int]) -> str:
    """At most four of them, in words."""
    chosen = [str(number) for number in (numbers if len(numbers) <= 4 else numbers[:4])]
    return " or ".join(chosen)
