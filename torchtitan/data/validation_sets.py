"""The sets that `[validation]` names, and what can be wrong with them. No torch.

Each set is given to registry, checks and probes as the sections that would train on it alone, as
the sources of a mixture are; problems are told by the keys that the user has written.
"""

import re
from collections import Counter
from collections.abc import Iterator
from dataclasses import replace

from torchtitan.config import JobConfig
from torchtitan.config.checks import is_mesh
from torchtitan.config.errors import Problem
from torchtitan.config.facts import Facts
from torchtitan.config.training_sections import Data
from torchtitan.config.validation_section import Validation, ValidationSet
from torchtitan.data.checks import check_dataset, check_prefetching
from torchtitan.data.named_sources import (
    HUB_KEYS,
    NamedSource,
    file_keys,
    keys_of_table,
    named_sources,
)
from torchtitan.data.probes import files_of, probe_sources
from torchtitan.data.registry import find_dataset
from torchtitan.distributed import context_checks, tensor_checks
from torchtitan.models import checks as model_checks

SECTION = "validation"
TABLES = "validation.sets"
ONLY_NAME = "validation"
"""The name of the set that the section's own keys describe."""
_NAME = re.compile(r"[A-Za-z0-9_-][A-Za-z0-9._-]*")
_SPLIT = "validation"


def validation_sets(config: JobConfig) -> list[NamedSource]:
    """The sets in the order in which the config names them; none while validation is off."""
    section = config.validation
    if not section.enable:
        return []
    if section.sets:
        return [
            _named(config, table, f"{TABLES}[{index}]") for index, table in enumerate(section.sets)
        ]
    only = ValidationSet(
        name=ONLY_NAME,
        dataset=section.dataset,
        dataset_path=section.dataset_path,
        column=section.column,
    )
    return [_named(config, only, SECTION)]


def check(facts: Facts) -> list[Problem]:
    """Problems of `[validation]` that config and mesh can tell; reads no file."""
    section = facts.config.validation
    if not section.enable:
        return []
    problems = [*_check_tables(section), *_check_numbers(section)]
    for named in validation_sets(facts.config):
        problems += [named.retold(problem) for problem in check_dataset(named)]
    if is_mesh(facts):
        problems += [*_check_sequence(facts), *_check_microbatches(facts)]
    return problems


def probe(facts: Facts) -> list[Problem]:
    """Problems of the sets' files, and files that are trained on, too."""
    config = facts.config
    sets = validation_sets(config)
    trained_on = files_of(named_sources(config.training, config.data)) if sets else {}
    return probe_sources(facts, sets, trained_on)


def _named(config: JobConfig, table: ValidationSet, place: str) -> NamedSource:
    section, training = config.validation, config.training
    entry = find_dataset(table.dataset)
    default_split = Data.model_fields["split"].default
    if entry is not None and entry.takes_split:
        default_split = _SPLIT
    hub = {key: getattr(table, key) for key in HUB_KEYS if key != "split"}
    shared = ("training.dataloader", "data.lanes")
    keys = {key: f"{SECTION}.{key.partition('.')[2]}" for key in shared}
    keys |= keys_of_table(place if section.sets else f"{TABLES}[0]", "dataset_path")
    if not section.sets:  # what only tables have is told as that of one
        keys["training.dataset_path"] = f"{place}.dataset_path"
        keys["training.dataset"] = f"{place}.dataset"
        keys["data.text_column"] = f"{place}.column"
    return NamedSource(
        name=table.name,
        weight=1.0,
        training=training.model_copy(
            update={
                "dataset": table.dataset,
                "dataset_path": table.dataset_path,
                "seq_len": section.seq_len or training.seq_len,
                "local_batch_size": section.local_batch_size or training.local_batch_size,
                "dataloader": section.dataloader,
            }
        ),
        data=config.data.model_copy(
            update={
                "sources": (),
                # For checks and probes: any amount of data will do, as lanes may be empty.
                "lanes": 1,
                "epochs": None,
                "shuffle": False,
                "text_column": table.column or config.data.text_column,
                "split": table.split or default_split,
                **hub,
                **file_keys(table, config.data),
            }
        ),
        place=place,
        keys=keys,
    )


def _check_tables(section: Validation) -> Iterator[Problem]:
    if not section.sets:
        return
    for key in ("dataset", "dataset_path", "column"):
        value = getattr(section, key)
        if value != Validation.model_fields[key].default:
            problem = f"and [[{TABLES}]] both say what to read"
            fix = "leave one of both out; this set can be another table"
            yield Problem(f"{SECTION}.{key}", problem, fix, value)
    names = [table.name for table in section.sets]
    for index, name in enumerate(names):
        if not _NAME.fullmatch(name):
            fix = "use letters, digits, `.`, `_` and `-` only, not starting with a dot"
            problem = "cannot be a part of a metric's name"
            yield Problem(f"{TABLES}[{index}].name", problem, fix, name)
    for name, count in Counter(names).items():
        if count > 1:
            key = f"{TABLES}[{names.index(name)}].name"
            yield Problem(key, "is the name of several sets", "give each a name of its own", name)


def _check_numbers(section: Validation) -> Iterator[Problem]:
    if section.steps == 0:
        fix = "set -1 for whole sets, or enable = false"
        yield Problem(f"{SECTION}.steps", "must be at least 1, or -1", fix, 0)
    yield from check_prefetching(section.dataloader, f"{SECTION}.dataloader")


def _check_sequence(facts: Facts) -> Iterator[Problem]:
    """A length of its own has to fit the model and be cut as that of training is."""
    config, seq_len = facts.config, facts.config.validation.seq_len
    if seq_len is None or seq_len == config.training.seq_len:
        return
    training = config.training.model_copy(update={"seq_len": seq_len})
    changed = replace(facts, config=config.model_copy(update={"training": training}))
    for feature in (model_checks, tensor_checks, context_checks):
        for problem in feature.check(changed):
            if problem.key == "training.seq_len":
                yield replace(problem, key=f"{SECTION}.seq_len")


def _check_microbatches(facts: Facts) -> Iterator[Problem]:
    """A pipeline cuts a batch of validation into microbatches as it cuts one of training."""
    batch = facts.config.validation.local_batch_size
    mesh = facts.config.parallelism
    size = mesh.pipeline_parallel_microbatch_size
    if batch is None or mesh.pipeline_parallel_degree == 1 or batch % size == 0:
        return
    problem = f"is not a multiple of parallelism.pipeline_parallel_microbatch_size = {size}"
    fix = f"set it to {-(-batch // size) * size}, or leave it unset"
    yield Problem(f"{SECTION}.local_batch_size", problem, fix, batch)
