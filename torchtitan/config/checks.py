"""Checks of the mesh and the batch against the number of processes."""

import os
from collections.abc import Iterable, Iterator
from typing import Any

from torchtitan.config import fitting
from torchtitan.config.errors import Problem
from torchtitan.config.facts import Facts
from torchtitan.config.fields import Key, keys_of, known_keys
from torchtitan.config.job_config import JobConfig
from torchtitan.config.paths import why_unexpanded

_DEGREES = (
    "data_parallel_replicate_degree",
    "data_parallel_shard_degree",
    "context_parallel_degree",
    "tensor_parallel_degree",
    "pipeline_parallel_degree",
)


def check(facts: Facts) -> list[Problem]:
    """Everything that arithmetic on the config and the world size can find. Reads no file."""
    problems = [*_mesh(facts), *_threads(facts)]
    if not problems:  # the batch is divided over a mesh, so there has to be one
        problems += _batch(facts)
    return [*problems, *_paths(facts.config), *fitting.notices(facts.config, facts.warmup_steps)]


def is_mesh(facts: Facts) -> bool:
    """Whether the degrees make a mesh of the processes."""
    return not any(_mesh(facts))


def _mesh(facts: Facts) -> Iterator[Problem]:
    mesh = facts.config.parallelism
    shard, replicate = mesh.data_parallel_shard_degree, mesh.data_parallel_replicate_degree
    key = "parallelism.data_parallel_shard_degree"
    fixed = replicate * facts.other_degrees
    if shard == 0:
        yield Problem(key, "must be at least 1, or -1 for the rest", "set it to -1", shard)
    elif shard == -1 and facts.world_size % fixed:
        yield Problem(
            key,
            f"{facts.world_size} processes cannot be divided by {_product(facts)} = {fixed}",
            f"{_mesh_fix(facts)}, or start a multiple of {fixed} processes",
            shard,
        )
    elif shard != -1 and fixed * shard != facts.world_size:
        yield Problem(
            "parallelism",
            f"{_product(facts)} = {fixed * shard}, but WORLD_SIZE = {facts.world_size}",
            f"{_mesh_fix(facts)}, or start {fixed * shard} processes",
        )


def _mesh_fix(facts: Facts) -> str:
    """The least that makes a mesh of these processes: degrees of data parallelism, if they can."""
    mesh, world_size, other = facts.config.parallelism, facts.world_size, facts.other_degrees
    if world_size % other:
        return f"choose tensor, context and pipeline degrees whose product divides {world_size}"
    rest, remainder = divmod(world_size, other * mesh.data_parallel_replicate_degree)
    if remainder == 0:
        return f"set data_parallel_shard_degree = -1 (which would be {rest})"
    copies = f"data_parallel_replicate_degree to {_listed(_divisors(world_size // other))}"
    if mesh.data_parallel_shard_degree == -1:
        return f"set {copies}"
    return f"set data_parallel_shard_degree to -1 and {copies}"


def _product(facts: Facts) -> str:
    """The degrees that count, as a product in words."""
    mesh = facts.config.parallelism
    factors = [(name, getattr(mesh, name)) for name in _DEGREES if getattr(mesh, name) != -1]
    shown = [f"{name} {degree}" for name, degree in factors if degree > 1] or ["all degrees 1"]
    return " x ".join(shown)


def _paths(config: JobConfig) -> Iterator[Problem]:
    """Paths with a variable that is not set: they would name a folder called `$NAME`."""
    for name, path in paths_of(config):
        reason = why_unexpanded(path)
        if reason:
            fix = "set it where the run starts, or write the folder itself"
            yield Problem(name, reason, fix, path, missing_asset=True)


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


def _threads(facts: Facts) -> Iterator[Problem]:
    cores = os.cpu_count() or 1
    threads = facts.config.debug.threads
    if facts.full and threads > cores:
        problem = f"this machine has {cores} cores"
        fix = f"set at most {cores}, or 0 to divide the cores among the processes"
        yield Problem("debug.threads", problem, fix, threads, severity="warning")


def _batch(facts: Facts) -> Iterator[Problem]:
    training = facts.config.training
    value = training.global_batch_size
    key = "training.global_batch_size"
    if value == 0:
        yield Problem(key, "must be at least 1, or -1 for one microbatch a rank", "set -1", value)
        return
    unit = training.local_batch_size * facts.dp_degree
    if facts.global_batch_size % unit:
        below = facts.global_batch_size // unit * unit
        nearest = [str(size) for size in (below, below + unit) if size > 0]
        share, rest = divmod(facts.global_batch_size, facts.dp_degree)
        smaller = [n for n in _divisors(share) if n < training.local_batch_size] if not rest else []
        local = f"training.local_batch_size to {smaller[-1]}" if smaller else "the mesh"
        yield Problem(
            key,
            "is not a multiple of training.local_batch_size x data-parallel degree = "
            f"{training.local_batch_size} x {facts.dp_degree} = {unit}",
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
