"""One line a dataset that says what is read, and what is left out and why."""

from typing import TYPE_CHECKING, Any

from torchtitan.config.errors import ConfigError, DataError
from torchtitan.config.run_context import RunContext
from torchtitan.data.document_ends import document_tokenizer
from torchtitan.data.listing import describe_left_out
from torchtitan.data.named_sources import NamedSource, named_sources
from torchtitan.data.registry import build_source
from torchtitan.data.tokenizers import build_tokenizer
from torchtitan.data.validation_sets import validation_sets

if TYPE_CHECKING:
    from torchtitan.data.sources import Source

_UNITS = ("bytes", "KiB", "MiB", "GiB", "TiB", "PiB")
_COUNTED_FILES = 256
"""Parquet footers that are read to count documents."""


def describe_data(context: RunContext) -> list[str]:
    """Lines about all that a run reads, for a check. What cannot be read is left to the probes."""
    config = context.config
    lines = []
    for named in [*named_sources(config.training, config.data), *validation_sets(config)]:
        try:
            lines.append(describe_source(named, build_source(named.training, named.data)))
        except (ConfigError, DataError):
            continue
    try:
        tokenizer = build_tokenizer(config.model.tokenizer_path)
        lines.append(document_tokenizer(tokenizer, config.data).describe())
    except ConfigError:
        pass
    return lines


def describe_source(named: NamedSource, source: "Source") -> str:
    """Return what is read of one dataset, and what is left out and why."""
    training = named.training
    place = named.place or "training data"
    name = training.dataset if training.dataset_path is None else training.dataset_path
    files: list[Any] = list(getattr(source, "files", ()))
    parts = []
    if files:
        size = _bytes(sum(file.size for file in files))
        parts.append(f"{len(files):,} file{'s' if len(files) > 1 else ''}, {size}")
    count = _num_documents(source)
    if count is not None:
        parts.append(f"{count:,} document{'s' if count != 1 else ''}")
    text = ", ".join(parts) or "a stream, of unknown length"
    left_out = describe_left_out(getattr(source, "left_out", {}))
    return f"{place} ({name}): {text}{f'; {left_out}' if left_out else ''}"


def _num_documents(source: "Source") -> int | None:
    """Documents of a source, where that is known without reading it."""
    from torchtitan.data.sources_parquet import ParquetSource, open_parquet
    from torchtitan.data.sources_torch import MapSource
    from torchtitan.data.token_source import TokenSource

    if isinstance(source, TokenSource):
        return sum(shard.num_documents for shard in source.index.shards)
    if isinstance(source, MapSource):
        return len(source.dataset)
    if isinstance(source, ParquetSource) and len(source.files) <= _COUNTED_FILES:
        count = 0
        for file in source.files:
            with open_parquet(file) as parquet:
                count += parquet.metadata.num_rows
        return count
    return None


def _bytes(size: float) -> str:
    unit = 0
    while size >= 1024 and unit < len(_UNITS) - 1:
        size, unit = size / 1024, unit + 1
    return f"{size:,.0f} {_UNITS[unit]}" if unit == 0 else f"{size:,.2f} {_UNITS[unit]}"
