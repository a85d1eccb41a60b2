"""The datasets of a config: `training.dataset_path`, `data.sources` or `validation.sets`.

Registry and checks know the keys of a single dataset. Each of several is given to them as the
sections that would read it alone, and problems are reported under the keys that the user wrote. No
torch.
"""

import math
import os
from collections import Counter
from collections.abc import Mapping, Sequence
from dataclasses import dataclass, field, replace
from pathlib import Path
from typing import TYPE_CHECKING, Any

from torchtitan.config import JobConfig
from torchtitan.config.errors import ConfigIssue
from torchtitan.config.schema import Data, DataSource, Training, ValidationSet
from torchtitan.data.c4 import default_validation
from torchtitan.data.registry import find_dataset
from torchtitan.utils.text import format_bytes, plural

if TYPE_CHECKING:
    from torchtitan.data.sources import Source

TABLES = "data.sources"
HUB_KEYS = ("subset", "split", "revision", "streaming")
"""Say which part of a Hugging Face dataset to read; each table has its own."""
FILE_KEYS = ("encoding", "document_separator")
"""Say how files are read; a table without them has those of `[data]`."""
ROW_KEYS = ("format", "columns", "roles")
"""Say what a row holds; a table without them has those of `[data]`."""
VALIDATION = "validation"
SETS = "validation.sets"
ONLY_NAME = "validation"
"""Name of the set that the section's own keys describe."""
_SPLIT = "validation"


@dataclass(frozen=True)
class NamedSource:
    """One dataset as the sections that would read it alone."""

    name: str
    """For metrics and messages."""
    weight: float
    training: Training
    data: Data
    place: str = ""
    """`data.sources[0]`; empty for `training.dataset_path`."""
    keys: Mapping[str, str] = field(default_factory=dict)
    """The keys of a single dataset -> the keys of this one."""

    def under_own_key(self, problem: ConfigIssue) -> ConfigIssue:
        """Return a problem of the single dataset under the keys of this source's table."""
        if not self.place:
            return problem
        for key, own in self.keys.items():
            if problem.key == key or problem.key.startswith(f"{key}."):
                return replace(problem, key=own + problem.key[len(key) :])
        # a key that all sources share
        return replace(problem, problem=f"{self.place} ({self.name}): {problem.problem}")


def keys_of_table(place: str, path: str) -> dict[str, str]:
    """Return the keys of a single dataset as those of the table at `place`.

    `path` is the name of the path in that table.
    """
    return {
        "training.dataset_path": f"{place}.{path}",
        "training.dataset": f"{place}.dataset",
        "data.text_column": f"{place}.column",
        **{f"data.{name}": f"{place}.{name}" for name in (*HUB_KEYS, *FILE_KEYS, *ROW_KEYS)},
    }


def own_or_shared(table: Any, data: Data) -> dict[str, Any]:
    """Return how the files and rows of a table are read."""
    own = {key: getattr(table, key) for key in (*FILE_KEYS, *ROW_KEYS)}
    return {key: getattr(data, key) if value is None else value for key, value in own.items()}


def named_sources(training: Training, data: Data) -> list[NamedSource]:
    """Return the datasets of a run, in the order of the config."""
    if not data.sources:
        return [NamedSource(training.dataset, 1.0, training, data)]
    names = _names(data.sources)
    return [
        NamedSource(
            name=name,
            weight=table.weight,
            training=training.model_copy(
                update={"dataset": table.dataset, "dataset_path": table.path}
            ),
            data=data.model_copy(
                update={
                    "sources": (),
                    "text_column": table.column or data.text_column,
                    **{key: getattr(table, key) for key in HUB_KEYS},
                    **own_or_shared(table, data),
                }
            ),
            place=f"{TABLES}[{index}]",
            keys=keys_of_table(f"{TABLES}[{index}]", "path"),
        )
        for index, (name, table) in enumerate(zip(names, data.sources))
    ]


def check_sources(training: Training, data: Data) -> list[ConfigIssue]:
    """Check `data.sources` as a whole: other keys next to it, weights, duplicates."""
    tables = data.sources
    if not tables:
        return []
    problems = _keys_beside(training, data)
    if not math.isfinite(sum(table.weight for table in tables)):
        problems.append(
            ConfigIssue(TABLES, "the weights have no finite sum", "give smaller weights")
        )
    if not any(table.weight for table in tables):
        fix = "give at least one source a weight above 0"
        problems.append(ConfigIssue(TABLES, "all weights are 0", fix))
    first_with: dict[tuple[str | None, ...], int] = {}
    for index, table in enumerate(tables):
        path = table.path and os.path.normpath(table.path)
        what = (path, table.dataset, table.column, table.subset, table.split, table.revision)
        first = first_with.setdefault(what, index)
        if first != index:
            problem = f"reads the same as {TABLES}[{first}]"
            problems.append(ConfigIssue(f"{TABLES}[{index}]", problem, "leave out one of them"))
    for name, count in Counter(table.name for table in tables if table.name is not None).items():
        if count > 1 or not name:
            index = [table.name for table in tables].index(name)
            problem = "is the name of several sources" if name else "is empty"
            fix = "give each source a different name, or none"
            problems.append(ConfigIssue(f"{TABLES}[{index}].name", problem, fix, name))
    return problems


def _keys_beside(training: Training, data: Data) -> list[ConfigIssue]:
    problems = []
    fix = f"leave one of both out; a dataset to be mixed in is another table of [[{TABLES}]]"
    for name, unset in (("dataset_path", None), ("dataset", "auto")):
        value = getattr(training, name)
        if value != unset:
            problem = f"and [[{TABLES}]] both say what to read"
            problems.append(ConfigIssue(f"training.{name}", problem, fix, value))
    for name in HUB_KEYS:
        value = getattr(data, name)
        if value != Data.model_fields[name].default:
            problem = f"belongs to one dataset, and [[{TABLES}]] names several"
            problems.append(
                ConfigIssue(f"data.{name}", problem, f"set it in the tables of {TABLES}", value)
            )
    if data.epochs is not None and len(data.sources) > 1:
        problems.append(
            ConfigIssue(
                "data.epochs",
                "has no meaning for several sources, because each starts over at its end",
                "remove it; training.steps ends the run",
                data.epochs,
            )
        )
    return problems


def _names(tables: tuple[DataSource, ...]) -> list[str]:
    """Return a name for each, given ones first; numbers keep equal ones apart."""
    taken = {table.name for table in tables if table.name}
    names = []
    for table in tables:
        name = table.name
        if not name:
            wanted = name = _own_name(table)
            number = 1
            while name in taken:
                number += 1
                name = f"{wanted}_{number}"
        taken.add(name)
        names.append(name)
    return names


def _own_name(table: DataSource) -> str:
    """Return the last part of the path that is not a pattern, without suffixes."""
    parts = [part for part in (table.path or "").split("/") if part and "*" not in part]
    return (parts[-1].split(".")[0] if parts else "") or table.dataset


def validation_sets(config: JobConfig) -> list[NamedSource]:
    """Return the sets in the order of the config; none while validation is off."""
    section = config.validation
    if not section.enable:
        return []
    if section.sets:
        return [
            _validation_set(config, table, f"{SETS}[{index}]")
            for index, table in enumerate(section.sets)
        ]
    path, dataset = section.dataset_path, section.dataset
    only = ValidationSet(
        name=ONLY_NAME,
        dataset=default_validation(path) if dataset is None else dataset,
        dataset_path=path,
        column=section.column,
    )
    return [_validation_set(config, only, VALIDATION)]


def _validation_set(config: JobConfig, table: ValidationSet, place: str) -> NamedSource:
    section, training = config.validation, config.training
    entry = find_dataset(table.dataset)
    default_split = Data.model_fields["split"].default
    if entry is not None and entry.takes_split:
        default_split = _SPLIT
    hub = {key: getattr(table, key) for key in HUB_KEYS if key != "split"}
    shared = ("training.dataloader", "data.lanes")
    keys = {key: f"{VALIDATION}.{key.partition('.')[2]}" for key in shared}
    keys |= keys_of_table(place if section.sets else f"{SETS}[0]", "dataset_path")
    if not section.sets:  # keys that only tables have are those of the first
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
                **own_or_shared(table, config.data),
            }
        ),
        place=place,
        keys=keys,
    )


def describe_amount(named: Sequence[NamedSource], sources: Sequence["Source"]) -> str:
    """Return what a run reads in a few words: `stdlib: 451 files, 8.4 MiB`.

    Documents are counted only where there are no files, which would have to be opened.
    """
    training = named[0].training
    path = training.dataset_path
    name = training.dataset if path is None else Path(path).name or path  # "." has no name
    files_of: list[list[Any]] = [list(getattr(source, "files", ())) for source in sources]
    # Of a mixture with a stream nobody knows the whole.
    files = [file for files in files_of for file in files] if all(files_of) else []
    amount = ""
    if files:
        size = format_bytes(sum(file.size for file in files))
        amount = f"{plural(len(files), 'file')}, {size}"
    elif len(sources) == 1:
        count = getattr(sources[0], "num_documents", lambda: None)()
        amount = "" if count is None else plural(count, "document")
    if len(sources) > 1:
        name = f"of {len(sources)} sources"
    return f"{name}: {amount}" if amount else name


def describe_source(named: NamedSource, source: "Source") -> str:
    """Return what is read of one dataset, and what is left out and why."""
    from torchtitan.data.files import FileSource
    from torchtitan.data.listing import describe_left_out

    training = named.training
    place = named.place or "training data"
    name = training.dataset if training.dataset_path is None else training.dataset_path
    files: list[Any] = list(getattr(source, "files", ()))
    parts = []
    if files:
        size = format_bytes(sum(file.size for file in files))
        parts.append(f"{plural(len(files), 'file')}, {size}")
    count = getattr(source, "num_documents", lambda: None)()
    if count is not None:
        parts.append(plural(count, "document"))
    notes = [", ".join(parts) or "a stream, of unknown length"]
    listing = getattr(source, "listing", None)
    if listing is not None:
        notes += [describe_left_out(listing.left_out)]
    if isinstance(source, FileSource):
        notes += [source.describe_encoding()]
    return f"{place} ({name}): {'; '.join(filter(None, notes))}"
