"""The datasets that a config names: that of `training.dataset_path`, or those of `data.sources`.

Everything that looks at a dataset (registry, checks, probes) knows the keys of a single one. Each
of several is therefore given to it as the config that would read it alone, and what is found to be
wrong with that is told by the keys that the user has written. No torch.
"""

import math
import os
from collections import Counter
from collections.abc import Mapping
from dataclasses import dataclass, field, replace
from typing import Any

from torchtitan.config.errors import ConfigError, ConfigIssue
from torchtitan.config.schema import Data, DataSource, Training

TABLES = "data.sources"
HUB_KEYS = ("subset", "split", "revision", "streaming")
"""Say which part of a Hugging Face dataset to read; each table has its own."""
FILE_KEYS = ("encoding", "document_separator")
"""Say how files are read; a table without them has those of `[data]`."""


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
    """What the keys of a single dataset are called where this one is configured."""

    def retold(self, problem: ConfigIssue) -> ConfigIssue:
        """A problem of the single dataset, by the keys of this source's table."""
        if not self.place:
            return problem
        key, text, fix = (self._translated(t) for t in (problem.key, problem.problem, problem.fix))
        if key == problem.key:  # one that all sources share
            text = f"{self.place} ({self.name}): {text}"
        return replace(problem, key=key, problem=text, fix=fix)

    def _translated(self, text: str) -> str:
        for key, own in self.keys.items():
            text = text.replace(key, own)
        return text


def keys_of_table(place: str, path: str) -> dict[str, str]:
    """The keys of a single dataset as those of the table at `place`, in which `path` is the name of
    the path."""
    return {
        "training.dataset_path": f"{place}.{path}",  # before the next one, which it begins with
        "training.dataset": f"{place}.dataset",
        "data.text_column": f"{place}.column",
        **{f"data.{name}": f"{place}.{name}" for name in (*HUB_KEYS, *FILE_KEYS)},
    }


def file_keys(table: Any, data: Data) -> dict[str, str | None]:
    """Return how the files of a table are read."""
    own = {key: getattr(table, key) for key in FILE_KEYS}
    return {key: getattr(data, key) if value is None else value for key, value in own.items()}


def named_sources(training: Training, data: Data) -> list[NamedSource]:
    """The datasets of a run, in the order in which the config names them."""
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
                    **file_keys(table, data),
                }
            ),
            place=f"{TABLES}[{index}]",
            keys=keys_of_table(f"{TABLES}[{index}]", "path"),
        )
        for index, (name, table) in enumerate(zip(names, data.sources))
    ]


def check_sources(training: Training, data: Data) -> list[ConfigIssue]:
    """Problems of `data.sources` as a whole: other keys beside it, weights, doubles."""
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
            fix = "give each source a name of its own, or none"
            problems.append(ConfigIssue(f"{TABLES}[{index}].name", problem, fix, name))
    return problems


def require_sources(training: Training, data: Data) -> list[NamedSource]:
    """`named_sources`, of a config that was not checked. Raises ConfigError."""
    problems = check_sources(training, data)
    if problems:
        raise ConfigError(problems)
    return named_sources(training, data)


def _keys_beside(training: Training, data: Data) -> list[ConfigIssue]:
    problems = []
    fix = f"leave one of both out; a dataset to be mixed in is another table of [[{TABLES}]]"
    if training.dataset_path is not None:
        problem = f"and [[{TABLES}]] both say what to read"
        problems.append(ConfigIssue("training.dataset_path", problem, fix, training.dataset_path))
    if training.dataset != "auto":
        problem = f"and [[{TABLES}]] both say what to read"
        problems.append(ConfigIssue("training.dataset", problem, fix, training.dataset))
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
                "has no meaning for several sources, as each begins anew when it is through",
                "remove it; training.steps ends the run",
                data.epochs,
            )
        )
    return problems


def _names(tables: tuple[DataSource, ...]) -> list[str]:
    """A name for each, the given ones first; numbers tell equal ones apart."""
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
    """The last part of the path that is not a pattern, without suffixes."""
    parts = [part for part in (table.path or "").split("/") if part and "*" not in part]
    return (parts[-1].split(".")[0] if parts else "") or table.dataset
