"""`torchtitan data show RUN STEP`: the rows that a step of a run trained on."""

from collections import defaultdict
from collections.abc import Mapping
from pathlib import Path

import numpy as np
from rich.console import Console
from rich.text import Text

from torchtitan.config.errors import ConfigError, ConfigIssue
from torchtitan.config.schema import JobConfig
from torchtitan.data.lanes import LaneSettings
from torchtitan.data.ledger import DocumentSpan, read_ledger
from torchtitan.data.loader import build_mixture
from torchtitan.data.mixture import Mixture
from torchtitan.data.pieces import Shard
from torchtitan.data.sources import BadRow, Row, row_record, row_tokens
from torchtitan.data.tokenizers import Tokenizer, build_tokenizer

_SHOWN_CHARACTERS = 200
Rows = Mapping[tuple[int, int, int], tuple[Shard, Row]]
"""By source, number of the shard, and place."""


def show_step(config: JobConfig, run: Path, step: int, console: Console) -> None:
    """Print the spans of each sequence of `step`, with the place and the text of each.

    `config` is that of `run`. Raises ConfigError.
    """
    steps = read_ledger(run)
    if step not in steps:
        known = f"those from {min(steps)} to {max(steps)}" if steps else "none"
        fix = "name one of these" if steps else "train with data.ledger = true"
        problem = f"is not in the ledger of {run}, which has {known}"
        raise ConfigError(ConfigIssue("data show", problem, fix, step))
    found = steps[step]
    tokenizer = build_tokenizer(config.model.tokenizer_path)
    num_lanes = (
        config.data.lanes
    )  # the ledger lacks those of a rank that was killed before its line
    assert num_lanes is not None, "a run keeps it"
    mixture = build_mixture(config.training, config.data, config.debug.seed, tokenizer, num_lanes)
    rows = rows_of(mixture, found.lanes)
    number = f" (step {found.data_step} of the data)" if found.data_step != step else ""
    console.print(Text(f"step {step}{number}", style="bold"))
    turns = max(map(len, found.lanes.values()), default=0)
    for turn in range(turns):
        for lane, sequences in found.lanes.items():
            for span in sequences[turn] if turn < len(sequences) else ():
                name = f"{mixture.names[span.source]}: " if len(mixture.names) > 1 else ""
                where, text = _describe(mixture.sources[span.source], span, rows, tokenizer)
                console.print(Text(f"sequence {turn * num_lanes + lane}: {name}{where}: {text!r}"))


def rows_of(mixture: Mixture, lanes: Mapping[int, list[list[DocumentSpan]]]) -> Rows:
    """Find the rows of all spans: one pass over each shard that holds any."""
    wanted: dict[tuple[int, int], set[int]] = defaultdict(set)
    for sequences in lanes.values():
        for spans in sequences:
            for span in spans:
                wanted[span.source, span.shard].add(span.place)
    found = {}
    for (source, number), places in wanted.items():
        settings = mixture.sources[source]
        if number >= len(settings.shards):
            continue  # other data than the run's
        shard = settings.shards[number]
        for row in settings.source.rows(shard):
            if row.place in places:
                found[source, number, row.place] = shard, row
                places.discard(row.place)
            if not places:
                break
    return found


def _describe(
    settings: LaneSettings, span: DocumentSpan, rows: Rows, tokenizer: Tokenizer
) -> tuple[str, str]:
    """Return where a span is, and the beginning of its text."""
    end = span.start + span.num_tokens
    if (span.source, span.shard, span.place) not in rows:
        return f"row {span.place} of part {span.shard}, which the data have no more", ""
    shard, row = rows[span.source, span.shard, span.place]
    where = settings.source.locate(shard, row)
    try:
        part = tokens_of(settings, span, row)
    except (BadRow, IndexError):
        return f"{where}, which has changed", ""
    if settings.chat is None:
        where += f", tokens {span.start}-{end - 1}"
    return where, tokenizer.decode(part.tolist())[:_SHOWN_CHARACTERS]


def tokens_of(settings: LaneSettings, span: DocumentSpan, row: Row) -> np.ndarray:
    """Return the tokens of a span, int32 `[num_tokens]`, from its row.

    Raises BadRow or IndexError if the row is another one than when the span was written.
    """
    if settings.chat is not None:
        return settings.chat.encode(row_record(settings.source, row)).units[span.start].tokens
    tokens = row_tokens(settings.source, settings.tokenizer, row)
    if tokens is None or len(tokens) < span.start + span.num_tokens:
        raise IndexError
    return tokens[span.start : span.start + span.num_tokens]
