"""The sets that `[validation]` names, and what can be wrong with them. No torch.

Each set is given to registry, checks and probes as the sections that would train on it alone, as
the sources of a mixture are; problems are told by the keys that the user has written.
"""

import re

from torchtitan.config import JobConfig
from torchtitan.config.schema import Data, ValidationSet
from torchtitan.data.named_sources import (
    HUB_KEYS,
    NamedSource,
    file_keys,
    keys_of_table,
)
from torchtitan.data.registry import find_dataset

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
