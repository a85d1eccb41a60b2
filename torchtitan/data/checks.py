"""What can be known to be wrong with the data before a run starts."""

import math
from itertools import islice
from typing import TYPE_CHECKING

from torchtitan.config.errors import ConfigError, DataError, Problem
from torchtitan.config.facts import Facts
from torchtitan.config.suggest import did_you_mean
from torchtitan.data.registry import build_source, datasets, missing_path
from torchtitan.distributed.tensor_checks import model_problems
from torchtitan.models.registry import get_family

if TYPE_CHECKING:
    from torchtitan.data.pieces import Shard
    from torchtitan.data.sources import FileSource, Source

_PROBED_SHARDS = 16
_PROBED_ROWS = 8
_PROBED_BYTES = 32 * 2**20
_ROW_FIX = 'mend the row, or set data.on_bad_row = "skip" to leave such rows out'
_ROUND_TRIP = "Round trip: 3 words,\n    indented; naïve café, 数学 1234.5!"


def check(facts: Facts) -> list[Problem]:
    """Problems that follow from the config and the number of processes; reads no files."""
    return [*_check_dataset(facts), *_check_lanes(facts), *_check_workers(facts)]


def probe(facts: Facts) -> list[Problem]:
    """Problems of the tokenizer's and the data's files: present, readable, enough, as expected."""
    problems = probe_tokenizer(facts)
    training, data = facts.config.training, facts.config.data
    if _check_dataset(facts):
        return problems
    try:
        source = build_source(training, data)
        problems += _probe_source(facts, source)
    except ConfigError as error:
        problems += error.problems
    except DataError as error:
        problems.append(Problem(_key(facts), str(error), "mend or replace the file"))
    return problems


def probe_tokenizer(facts: Facts) -> list[Problem]:
    """Problems of the tokenizer at `model.tokenizer_path`, and of a model that it does not fit."""
    from torchtitan.data.tokenizers import KEY, build_tokenizer

    path = facts.config.model.tokenizer_path
    try:
        tokenizer = build_tokenizer(path)
    except ConfigError as error:
        return error.problems
    problems = _vocabulary_problems(facts, tokenizer.vocab_size)
    if tokenizer.decode(tokenizer.encode(_ROUND_TRIP, bos=False, eos=False)) == _ROUND_TRIP:
        return problems
    return [
        *problems,
        Problem(
            KEY,
            "does not give back the text that it encodes (tried letters, blanks and signs)",
            "check that it suits your text; ignore this if it folds case or blanks on purpose",
            value=path,
            severity="warning",
        ),
    ]


def _vocabulary_problems(facts: Facts, vocab_size: int) -> list[Problem]:
    """What the tokenizer adds to the problems that the model's own check finds."""
    model = facts.config.model
    try:
        family = get_family(model.name)
        family.resolve(model)
    except ConfigError:
        return []
    try:
        args = family.resolve(model, vocab_size)
    except ConfigError as error:
        return error.problems
    return model_problems(facts, args)


def _check_dataset(facts: Facts) -> list[Problem]:
    training = facts.config.training
    entry = datasets().get(training.dataset)
    if entry is None:
        fix = did_you_mean(training.dataset, sorted(datasets()))
        return [Problem("training.dataset", "is unknown", fix, value=training.dataset)]
    path = training.dataset_path
    if path is None:
        return [missing_path(training.dataset)] if entry.needs_path else []
    if not path or "\0" in path:
        fix = "give a file, a folder or a glob"
        return [Problem("training.dataset_path", "is not a path", fix, value=path)]
    if training.dataset == "stdlib":
        fix = 'remove it, or set training.dataset to "auto", "json" or "text"'
        return [Problem("training.dataset_path", 'is not used by "stdlib"', fix, value=path)]
    return []


def _check_lanes(facts: Facts) -> list[Problem]:
    """Whoever serves it, a lane gives every step the same number of sequences."""
    lanes, dp, batch = facts.num_lanes, facts.dp_degree, facts.global_batch_size
    problems = []
    if batch % lanes:
        below = max(n for n in range(1, lanes + 1) if batch % n == 0)
        problem = f"does not divide the global batch of {batch} sequences"
        problems.append(Problem("data.lanes", problem, f"set for example {below}", value=lanes))
    if lanes % dp:
        valid = [n for n in _divisors(batch) if n % dp == 0]
        fix = (
            f"set data.lanes to {_nearest(lanes, valid)}, or another data-parallel degree"
            if valid
            else f"set training.global_batch_size to a multiple of {dp}"
        )
        origin = "" if facts.config.data.lanes else " (chosen from training.global_batch_size)"
        problem = f"{lanes} lanes{origin} cannot be shared by {dp} data-parallel ranks"
        problems.append(Problem("data.lanes", problem, fix, value=facts.config.data.lanes))
    return problems


def _check_workers(facts: Facts) -> list[Problem]:
    options = facts.config.training.dataloader
    key = "training.dataloader.num_workers"
    if options.num_workers == 0:
        if options.prefetch_factor is None:
            return []
        return [
            Problem(
                "training.dataloader.prefetch_factor",
                "nothing is read ahead without reading processes",
                f"remove it, or set {key} above 0",
                value=options.prefetch_factor,
            )
        ]
    own = facts.num_lanes // facts.dp_degree
    if own == 0 or facts.num_lanes % facts.dp_degree:
        return []
    used = max(n for n in range(1, own + 1) if own % n == 0 and n <= options.num_workers)
    if used == options.num_workers:
        return []
    return [
        Problem(
            key,
            f"the {own} data lanes of a rank are served by {used} processes",
            f"set {used}, or another divisor of {own}",
            value=options.num_workers,
            severity="warning",
        )
    ]


def _probe_source(facts: Facts, source: "Source") -> list[Problem]:
    """Problems of dealing the data out, of their first rows, and of files that are cut off."""
    from torchtitan.data.pieces import too_few_shards
    from torchtitan.data.sources import FileSource

    shards = source.shards(facts.num_lanes)
    if len(shards) < facts.num_lanes:
        return [too_few_shards(len(shards), facts.num_lanes, facts.config.data.lanes)]
    problems = _probe_rows(facts, source, shards)
    if isinstance(source, FileSource) and not problems:
        problems = [
            *_probe_amount(facts, source),
            *_probe_whole_files(facts, source, shards),
        ]
    return problems


def _probe_rows(facts: Facts, source: "Source", shards: "list[Shard]") -> list[Problem]:
    """The first unusable row among the first rows of some shards, unless some may be left out."""
    from torchtitan.data.sources import BadRow

    num_usable = 0
    first: tuple[str, BadRow] | None = None
    for shard in shards[:: max(1, len(shards) // _PROBED_SHARDS)]:
        for row in islice(source.rows(shard), _PROBED_ROWS):
            try:
                num_usable += bool(source.text(row))
            except BadRow as error:
                first = first or (source.locate(shard, row), error)
    if num_usable and (first is None or facts.config.data.on_bad_row == "skip"):
        return []
    if first is None:
        return [Problem(_key(facts), "the first rows hold no text", "give data with content")]
    where, reason = first
    if reason.column is None:
        return [Problem(_key(facts), f"{where}: {reason}", _ROW_FIX)]
    fix = "set it to the column that holds the text"
    return [Problem("data.text_column", f"{where}: {reason}", fix, value=reason.column)]


def _probe_amount(facts: Facts, source: "FileSource") -> list[Problem]:
    """Whether finite, uncompressed data can fill one step; a token is at least a byte."""
    training, epochs = facts.config.training, facts.config.data.epochs
    if epochs is None or any(file.compression for file in source.files):
        return []
    num_bytes = sum(file.size for file in source.files)
    available = num_bytes * epochs // training.seq_len
    if available >= facts.global_batch_size:
        return []
    return [
        Problem(
            "data.epochs",
            f"{epochs} x {num_bytes} bytes give at most {available} sequences of"
            f" {training.seq_len} tokens, and a step takes {facts.global_batch_size}",
            "give more data, or lower training.global_batch_size or training.seq_len",
            value=epochs,
        )
    ]


def _probe_whole_files(facts: Facts, source: "FileSource", shards: "list[Shard]") -> list[Problem]:
    """Reads small files that are not cut into ranges to their end: enough rows, not truncated."""
    from torchtitan.data.pieces import Shard

    budget = _PROBED_BYTES
    problems = []
    strides = {shard.file: shard.stride for shard in shards if shard.end is None}
    num_filled: int | None = sum(shard.end is not None for shard in shards)
    for index, stride in strides.items():
        file = source.files[index]
        budget -= file.size
        if budget < 0:
            num_filled = None
            break
        num_rows = 0
        for row in source.rows(Shard(index)):
            num_rows += 1
            if row.flaw and facts.config.data.on_bad_row == "error":
                where = source.locate(Shard(index), row)
                problems.append(Problem(_key(facts), f"{where}: {row.flaw}", _ROW_FIX))
                break
        if num_filled is not None:
            num_filled += min(num_rows, stride)
    if not problems and num_filled is not None and num_filled < facts.num_lanes:
        problems.append(too_few_documents(num_filled, facts))
    return problems


def too_few_documents(count: int, facts: Facts) -> Problem:
    """The problem of a lane that would have nothing to read."""
    return Problem(
        "data.lanes",
        f"the data hold {count} documents, too few for {facts.num_lanes} lanes",
        f"set data.lanes to at most {count}, or give more data",
        value=facts.config.data.lanes,
    )


def _key(facts: Facts) -> str:
    named = facts.config.training.dataset_path is None
    return "training.dataset" if named else "training.dataset_path"


def _divisors(number: int) -> list[int]:
    small = [n for n in range(1, math.isqrt(number) + 1) if number % n == 0]
    return sorted({*small, *(number // n for n in small)})


def _nearest(number: int, candidates: list[int]) -> int:
    return min(candidates, key=lambda candidate: abs(candidate - number))
