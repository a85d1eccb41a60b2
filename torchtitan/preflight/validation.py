"""Checks of `[validation]`. No torch.

Each set is checked as the sections that would train on it alone; issues name the keys that the
user wrote.
"""

import re
from collections import Counter
from collections.abc import Iterator
from dataclasses import replace

from torchtitan.config.errors import ConfigIssue
from torchtitan.config.run_context import RunContext
from torchtitan.config.schema import Validation
from torchtitan.data.named_sources import SETS, VALIDATION, named_sources, validation_sets
from torchtitan.preflight import context_parallel, model
from torchtitan.preflight.data import check_dataset, check_prefetching
from torchtitan.preflight.data_files import check_files
from torchtitan.preflight.mesh import is_mesh

_NAME = re.compile(r"[A-Za-z0-9_-][A-Za-z0-9._-]*")


def check_static(context: RunContext) -> list[ConfigIssue]:
    """Check `[validation]` by config and mesh; reads no files."""
    section = context.config.validation
    if not section.enable:
        return []
    issues = [*_check_tables(section), *_check_numbers(section)]
    for named in validation_sets(context.config):
        issues += [named.under_own_key(problem) for problem in check_dataset(named)]
    if is_mesh(context):
        issues += [*_check_sequence(context), *_check_microbatches(context)]
    return issues


def check_environment(context: RunContext) -> list[ConfigIssue]:
    """Check the files of the sets, and warn of files that are also trained on."""
    config = context.config
    sets = validation_sets(config)
    trained_on = named_sources(config.training, config.data) if sets else []
    return check_files(context, sets, trained_on)


def _check_tables(section: Validation) -> Iterator[ConfigIssue]:
    if not section.sets:
        return
    for key in ("dataset", "dataset_path", "column"):
        value = getattr(section, key)
        if value != Validation.model_fields[key].default:
            problem = f"and [[{SETS}]] both say what to read"
            fix = "leave one of both out; this set can be another table"
            yield ConfigIssue(f"{VALIDATION}.{key}", problem, fix, value)
    names = [table.name for table in section.sets]
    for index, name in enumerate(names):
        if not _NAME.fullmatch(name):
            fix = "use letters, digits, `.`, `_` and `-` only, not starting with a dot"
            key = f"{SETS}[{index}].name"
            yield ConfigIssue(key, "cannot be a part of a metric's name", fix, name)
    for name, count in Counter(names).items():
        if count > 1:
            key = f"{SETS}[{names.index(name)}].name"
            fix = "give each a different name"
            yield ConfigIssue(key, "is the name of several sets", fix, name)


def _check_numbers(section: Validation) -> Iterator[ConfigIssue]:
    if section.steps == 0:
        fix = "set -1 for whole sets, or enable = false"
        yield ConfigIssue(f"{VALIDATION}.steps", "must be at least 1, or -1", fix, 0)
    yield from check_prefetching(section.dataloader, f"{VALIDATION}.dataloader")


def _check_sequence(context: RunContext) -> Iterator[ConfigIssue]:
    """Check that a different sequence length fits the model and the mesh."""
    config, seq_len = context.config, context.config.validation.seq_len
    if seq_len is None or seq_len == config.training.seq_len:
        return
    training = config.training.model_copy(update={"seq_len": seq_len})
    changed = replace(context, config=config.model_copy(update={"training": training}))
    for feature in (model, context_parallel):
        for problem in feature.check_static(changed):
            if problem.key == "training.seq_len":
                yield replace(problem, key=f"{VALIDATION}.seq_len")


def _check_microbatches(context: RunContext) -> Iterator[ConfigIssue]:
    """Check that a pipeline can split a batch of validation into microbatches."""
    batch, mesh = context.config.validation.local_batch_size, context.config.parallelism
    size = mesh.pipeline_parallel_microbatch_size
    if batch is None or mesh.pipeline_parallel_degree == 1 or batch % size == 0:
        return
    problem = f"is not a multiple of parallelism.pipeline_parallel_microbatch_size = {size}"
    fix = "set it to a multiple, or leave it unset"
    yield ConfigIssue(f"{VALIDATION}.local_batch_size", problem, fix, batch)
