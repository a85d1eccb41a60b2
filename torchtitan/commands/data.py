"""`torchtitan data show`: rows as they are trained, their lengths, and what is padding or cut."""

import argparse
from collections.abc import Iterator
from contextlib import suppress
from dataclasses import dataclass, field
from itertools import islice
from pathlib import Path

import numpy as np
from rich.console import Console
from rich.text import Text

from torchtitan.checkpoint.stored_run import CONFIG_NAME
from torchtitan.commands.data_step import show_step
from torchtitan.config.custom_import import import_custom_modules
from torchtitan.config.errors import ConfigError, ConfigIssue, DataError
from torchtitan.config.exit_codes import DONE
from torchtitan.config.load import load_config
from torchtitan.config.run_context import RunContext
from torchtitan.config.schema import Data
from torchtitan.config.shipped import shipped_configs
from torchtitan.data.chat_encoder import Encoded, Unit, chat_encoder, describe_rows
from torchtitan.data.chat_formats import ChatFormat
from torchtitan.data.document_ends import document_tokenizer
from torchtitan.data.named_sources import NamedSource, named_sources
from torchtitan.data.packing import COUNTS, Position
from torchtitan.data.pieces import Shard
from torchtitan.data.registry import HUB_PREFIX, build_source
from torchtitan.data.row_packing import RowPacker, RowRule, Units
from torchtitan.data.sample import text_of
from torchtitan.data.sources import BadRow, Row, Source, row_record, row_tokens
from torchtitan.data.tokenizers import Tokenizer, build_tokenizer
from torchtitan.training.pretrained_config import with_pretrained
from torchtitan.utils.text import plural

_BARS, _BAR_WIDTH = 12, 40
_BATCH = 8
"""Sequences of a batch without packing, for the share of padding."""
_SHOWN_FLAWS = 3


@dataclass
class _Found:
    """The rows of a dataset, measured."""

    units: list[Unit] = field(default_factory=list)
    num_rows: int = 0
    """Those that can be used or are left out as configured."""
    counts: dict[str, int] = field(default_factory=lambda: dict.fromkeys(COUNTS, 0))
    lengths: list[int] = field(default_factory=list)
    """Tokens of each row, before anything is cut."""
    flaws: list[str] = field(default_factory=list)

    def add(self, encoded: Encoded) -> None:
        """Count a row."""
        self.num_rows += 1
        self.units += encoded.units
        self.lengths.append(encoded.num_tokens)
        for name in COUNTS:
            self.counts[name] += getattr(encoded, name)


def run(options: argparse.Namespace) -> int:
    """Show each dataset of a config, or a step of a run. Raises ConfigError."""
    words = options.settings
    step = words.pop(1) if len(words) > 1 and words[1].isdigit() else None
    loaded = load_config(_as_settings(words))
    if problems := import_custom_modules(loaded.config):
        raise ConfigError(problems)
    config = with_pretrained(loaded, with_weights=False).config
    config = RunContext(config, 1, "cpu", full=False).config
    tokenizer = build_tokenizer(config.model.tokenizer_path)
    console = Console(soft_wrap=True, highlight=False)
    if step is not None:
        show_step(loaded.config, Path(words[0]), int(step), console)
        return DONE
    for named in named_sources(config.training, config.data):
        try:
            _show(named, tokenizer, options, console)
        except ConfigError as error:
            raise ConfigError([named.under_own_key(issue) for issue in error.problems]) from None
    return DONE


def _as_settings(words: list[str]) -> list[str]:
    """Return the settings to load: a run's config, or a config that reads the given data."""
    if not words or words[0].startswith("-"):
        fix = "name a TOML, a run's folder, or the data"
        raise ConfigError(ConfigIssue("data show", "FILE is missing", fix))
    path, rest = words[0], words[1:]
    if path.endswith(".toml") or (path in shipped_configs() and not Path(path).exists()):
        return words
    if (stored := Path(path) / CONFIG_NAME).is_file():
        return [str(stored), *rest]
    is_hub = path.startswith(HUB_PREFIX)
    given = [f"--training.{'dataset' if is_hub else 'dataset_path'}", path, *rest]
    if any(word.startswith("--data.format") for word in rest):
        return given
    return [*given, "--data.format", _format_of(given)]


def _format_of(settings: list[str]) -> str:
    """Return the format whose columns the first row has."""
    config = load_config(settings).config
    for name in ("preference", "chat", "instruct"):
        data = config.data.model_copy(update={"format": name})
        with suppress(ConfigError, DataError, BadRow):
            source = build_source(config.training, data)
            if not hasattr(source, "record"):
                continue
            _, row = next(_rows(source))
            if not ChatFormat(name, data.columns, {}).missing(list(row_record(source, row))):
                return name
    return "text"


def _rows(source: Source) -> Iterator[tuple[Shard, Row]]:
    for shard in source.shards(1):
        for row in source.rows(shard):
            yield shard, row


def _show(
    named: NamedSource, tokenizer: Tokenizer, options: argparse.Namespace, console: Console
) -> None:
    data, training = named.data, named.training
    source = build_source(training, data)
    encoder = chat_encoder(training, data, tokenizer)
    documents = document_tokenizer(tokenizer, data)
    described = describe_rows(training, data, tokenizer)
    console.print(
        Text(
            f"{named.training.dataset_path or named.name}: format {data.format}; {described}",
            style="bold",
        )
    )
    found = _Found()
    for shard, row in islice(_rows(source), options.rows):
        try:
            if encoder is None:
                encoded = _of_text(row_tokens(source, documents, row))
            else:
                encoded = encoder.encode(row_record(source, row))
        except BadRow as error:
            found.flaws.append(f"{source.locate(shard, row)}: {error}")
            continue
        found.add(encoded)
        for unit in encoded.units if found.num_rows <= options.samples else ():
            console.print(Text(f"\n--- {source.locate(shard, row)}", style="dim"))
            console.print(_marked(unit, tokenizer, console.is_terminal))
    console.print()
    for line in _report(found, training.seq_len, data):
        console.print(Text(line))


def _of_text(tokens: np.ndarray | None) -> Encoded:
    if tokens is None or len(tokens) < 2:
        return Encoded([], 0, untrained=True)
    unit = Unit(tokens, np.ones(len(tokens), bool), (len(tokens),))
    return Encoded([unit], len(tokens))


def _marked(unit: Unit, tokenizer: Tokenizer, in_colour: bool) -> Text:
    """Return the text of a unit, its trained tokens marked."""
    text = Text()
    run: list[int] = []

    def flush(trained: bool) -> None:
        shown = text_of(run, tokenizer)
        if trained and not in_colour:
            shown = f"⟦{shown}⟧"
        text.append(shown, style="bold green" if trained else "")
        run.clear()

    borders = set(np.cumsum(unit.lengths).tolist())
    for place, token in enumerate(unit.tokens.tolist()):
        if run and unit.trained[place] != unit.trained[place - 1]:
            flush(bool(unit.trained[place - 1]))
        if place in borders:
            flush(bool(unit.trained[place - 1]))
            text.append("\n    or (rejected):\n", style="dim")
        run.append(token)
    flush(bool(unit.trained[-1]))
    return text


def _report(found: _Found, seq_len: int, data: Data) -> Iterator[str]:
    """Yield the lines about all rows that were read."""
    num_tokens = sum(len(unit.tokens) for unit in found.units)
    num_trained = sum(int(unit.trained.sum()) for unit in found.units)
    yield (
        f"{plural(found.num_rows, 'row')}, {plural(len(found.units), 'sample')},"
        f" {num_tokens:,} tokens; trained: {num_trained:,} ({_share(num_trained, num_tokens)})"
    )
    for flaw in found.flaws[:_SHOWN_FLAWS]:
        yield f"cannot be used: {flaw}"
    if len(found.flaws) > _SHOWN_FLAWS:
        yield f"cannot be used: {len(found.flaws) - _SHOWN_FLAWS} more rows"
    cut = sum(found.lengths) - num_tokens
    said = {
        "truncated": f"longer than training.seq_len = {seq_len} (on_long = {data.on_long})",
        "dropped": f"longer than training.seq_len = {seq_len}, and dropped",
        "untrained": "without a trained token, and left out",
    }
    for name, count in found.counts.items():
        if count:
            yield f"{plural(count, 'row')} {said[name]}"
    if cut > 0:
        yield f"cut off or left out: {cut:,} tokens ({_share(cut, sum(found.lengths))})"
    if found.lengths:
        yield from _histogram(found.lengths)
    if found.units and data.format != "text":
        yield from _padding(found.units, seq_len, data)


def _histogram(lengths: list[int]) -> Iterator[str]:
    yield "tokens of a row:"
    counts, borders = np.histogram(lengths, _BARS, (min(lengths), max(lengths) + _BARS))
    for count, low, high in zip(counts.tolist(), borders, borders[1:]):
        bar = "#" * -(-_BAR_WIDTH * count // int(counts.max()))
        yield f"{int(np.ceil(low)):>8} - {int(np.ceil(high)) - 1:<8} {count:>7} {bar}"


def _padding(units: list[Unit], seq_len: int, data: Data) -> Iterator[str]:
    """Yield how much of the sequences is padding, with and without packing."""
    used = sum(unit.size for unit in units)
    rows = list(_sequences(units, seq_len, packing=True))
    total = len(rows) * seq_len
    chosen = "" if data.packing else " (not chosen)"
    yield (
        f"packed{chosen}: {plural(len(rows), 'sequence')} of {seq_len} tokens,"
        f" {_share(total - used, total)} of them padding"
    )
    rows = list(_sequences(units, seq_len, packing=False))
    multiple, total = data.pad_to_multiple, 0
    for start in range(0, len(rows), _BATCH):
        batch = rows[start : start + _BATCH]
        total += len(batch) * min(seq_len, -(-max(batch) // multiple) * multiple)
    chosen = " (not chosen)" if data.packing else ""
    yield (
        f"one a sequence{chosen}: {plural(len(rows), 'sequence')}, in batches of {_BATCH},"
        f" {_share(total - used, total)} of them padding"
    )


def _sequences(units: list[Unit], seq_len: int, packing: bool) -> Iterator[int]:
    """Yield the positions used of each sequence."""
    rows = (Units(Position(row=number), (unit,)) for number, unit in enumerate(units))
    packer = RowPacker(rows, RowRule(seq_len, packing, 0), 0)
    while (item := packer.next_sample()) is not None:
        yield item[0].num_inputs


def _share(part: int, whole: int) -> str:
    return f"{part / max(1, whole):.1%}"
