"""What can be known to be wrong with the data before a run starts."""

import math
import pickle
import re
from itertools import islice
from typing import TYPE_CHECKING

from torchtitan.config.checks import is_mesh
from torchtitan.config.errors import ConfigError, DataError, Problem
from torchtitan.config.facts import Facts
from torchtitan.data.registry import (
    DatasetEntry,
    build_source,
    find_dataset,
    missing_path,
    unknown_dataset,
)
from torchtitan.distributed.tensor_checks import model_problems
from torchtitan.models.registry import get_family

if TYPE_CHECKING:
    from torchtitan.data.pieces import Shard
    from torchtitan.data.sources import Source
    from torchtitan.data.sources_files import FileSource

_PROBED_SHARDS = 16
_PROBED_ROWS = 8
_PROBED_BYTES = 32 * 2**20
_COMMIT = re.compile(r"[0-9a-f]{40}")
_ROW_FIX = 'mend the row, or set data.on_bad_row = "skip" to leave such rows out'
_ROUND_TRIP = "Round trip: 3 words,\n    indented; naïve café, 数学 1234.5!"


def check(facts: Facts) -> list[Problem]:
    """Problems that follow from the config and the number of processes; reads no files."""
    problems = _check_dataset(facts)
    if is_mesh(facts):  # else there are no data ranks to share anything
        problems += [*_check_lanes(facts), *_check_workers(facts)]
    return problems


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
        family.resolve_args(model.flavor, model.args)
    except ConfigError:
        return []
    try:
        args = family.resolve_args(model.flavor, model.args, vocab_size)
    except ConfigError as error:
        return error.problems
    return model_problems(facts, args)


def _check_dataset(facts: Facts) -> list[Problem]:
    training = facts.config.training
    entry = find_dataset(training.dataset)
    if entry is None:
        return [unknown_dataset(training.dataset)]
    problems = _check_hub_keys(facts, entry)
    path = training.dataset_path
    if path is None:
        return [*problems, *([missing_path(training.dataset)] if entry.needs_path else [])]
    if not path or "\0" in path:
        fix = "give a file, a folder or a glob"
        problems.append(Problem("training.dataset_path", "is not a path", fix, value=path))
    elif not entry.takes_path:
        fix = 'remove it, or set training.dataset to "auto", "json", "text" or "parquet"'
        problem = f'is not used by "{training.dataset}"'
        problems.append(Problem("training.dataset_path", problem, fix, value=path))
    return problems


def _check_hub_keys(facts: Facts, entry: DatasetEntry) -> list[Problem]:
    """Keys of `[data]` that say which part of a Hugging Face dataset to read."""
    data = facts.config.data
    used = {"split": entry.takes_split}
    used |= dict.fromkeys(("subset", "revision", "streaming"), entry.takes_hub_keys)
    problems = []
    for name, is_used in used.items():
        value = getattr(data, name)
        if not is_used and value != type(data).model_fields[name].default:
            problem = f'is not used by "{entry.name}"'
            fix = 'remove it; it is for training.dataset = "hf:owner/name"'
            problems.append(Problem(f"data.{name}", problem, fix, value=value))
        elif value == "":
            fix = "name one, or remove it"
            problems.append(Problem(f"data.{name}", "is empty", fix, value=value))
    return problems


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
    from torchtitan.data.sources_files import FileSource

    problems = [*getattr(source, "problems", list)(), *_probe_pickling(facts, source)]
    if problems:
        return problems
    shards = source.shards(facts.num_lanes)
    if len(shards) < facts.num_lanes:
        return [too_few_shards(len(shards), facts.num_lanes, facts.config.data.lanes)]
    problems = _probe_rows(facts, source, shards)
    problems += _probe_revision(facts, source)
    if isinstance(source, FileSource) and not problems:
        problems = [
            *_probe_amount(facts, source),
            *_probe_whole_files(facts, source, shards),
        ]
    return problems


def _probe_pickling(facts: Facts, source: "Source") -> list[Problem]:
    """Whether reading processes can have a copy of a dataset that is not the library's own."""
    from torchtitan.data.sources_files import FileSource

    num_workers = facts.config.training.dataloader.num_workers
    if num_workers == 0 or isinstance(source, FileSource):
        return []
    try:
        pickle.dumps(source)
    except Exception as error:
        problem = f"the dataset cannot be sent to reading processes: {error}"
        fix = "make it picklable (no open files, lambdas or local classes), or set 0"
        key = "training.dataloader.num_workers"
        return [Problem(key, problem, fix, value=num_workers)]
    return []


def _probe_revision(facts: Facts, source: "Source") -> list[Problem]:
    """A dataset of the hub may change while a run is stopped, which a resume refuses."""
    commit, revision = source.description.get("commit"), facts.config.data.revision
    if commit is None or _COMMIT.fullmatch(revision or ""):
        return []
    return [
        Problem(
            "data.revision",
            "the dataset may change, and a resume would then be refused",
            f'set "{commit}", the newest commit',
            value=revision,
            severity="warning",
        )
    ]


def _probe_rows(facts: Facts, source: "Source", shards: "list[Shard]") -> list[Problem]:
    """The first unusable row among the first rows of some shards, unless some may be left out."""
    from torchtitan.data.sources import BadRow
    from torchtitan.data.sources_torch import StreamSource

    # Each part of a stream may be a connection of its own.
    num_probed = 1 if isinstance(source, StreamSource) else _PROBED_SHARDS
    num_usable = 0
    first: tuple[str, BadRow] | None = None
    for shard in shards[:: -(-len(shards) // num_probed)]:
        for row in islice(source.rows(shard), _PROBED_ROWS):
            try:
                num_usable += len(source.text(row)) > 0
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
