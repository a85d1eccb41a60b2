"""What can be known to be wrong with the data before a run starts."""

import codecs
import math

from torchtitan.config.checks import is_mesh
from torchtitan.config.errors import ConfigError, Problem
from torchtitan.config.facts import Facts
from torchtitan.config.training_sections import Data, Dataloader
from torchtitan.data.named_sources import NamedSource, check_sources, named_sources
from torchtitan.data.probes import probe_data
from torchtitan.data.registry import DatasetEntry, find_dataset, missing_path, unknown_dataset
from torchtitan.distributed.tensor_checks import model_problems
from torchtitan.models.registry import get_family

_LONGEST_SEPARATOR = 256
_ROUND_TRIP = "Round trip: 3 words,\n    indented; naïve café, 数学 1234.5!"


def check(facts: Facts) -> list[Problem]:
    """Problems that follow from the config and the number of processes; reads no files."""
    problems = check_data(facts)
    if is_mesh(facts):  # else there are no data ranks to share anything
        problems += [*_check_lanes(facts), *_check_workers(facts)]
    return problems


def check_data(facts: Facts) -> list[Problem]:
    """Those of `check` that are about what is read."""
    config = facts.config
    problems = check_sources(config.training, config.data)
    if problems:
        return problems
    for named in named_sources(config.training, config.data):
        problems += [named.retold(problem) for problem in check_dataset(named)]
    return problems


def probe(facts: Facts) -> list[Problem]:
    """Problems of the tokenizer's and the data's files: present, readable, enough, as expected."""
    problems = probe_tokenizer(facts)
    return problems if check_data(facts) else problems + probe_data(facts)


def probe_tokenizer_files(facts: Facts) -> list[Problem]:
    """Problems of the tokenizer alone, whatever the model."""
    return _probe_tokenizer(facts, with_model=False)


def probe_tokenizer(facts: Facts) -> list[Problem]:
    """Problems of the tokenizer at `model.tokenizer_path`, and of a model that it does not fit."""
    return _probe_tokenizer(facts, with_model=True)


def _probe_tokenizer(facts: Facts, with_model: bool) -> list[Problem]:
    from torchtitan.data.document_ends import probe_ends
    from torchtitan.data.tokenizers import KEY, build_tokenizer

    path = facts.config.model.tokenizer_path
    try:
        tokenizer = build_tokenizer(path)
    except ConfigError as error:
        return error.problems
    problems = _vocabulary_problems(facts, tokenizer.vocab_size) if with_model else []
    problems += probe_ends(tokenizer, facts.config.data)
    back = tokenizer.decode(tokenizer.encode(_ROUND_TRIP, bos=False, eos=False))
    if back == _ROUND_TRIP:
        return problems
    return [
        *problems,
        Problem(
            KEY,
            f"does not give back the text that it encodes: {_ROUND_TRIP!r} comes back as {back!r}",
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


def check_dataset(named: NamedSource) -> list[Problem]:
    """Problems of one dataset, by the keys of a single one."""
    training = named.training
    entry = find_dataset(training.dataset)
    if entry is None:
        return [unknown_dataset(training.dataset)]
    problems = [*_check_hub_keys(named.data, entry), *_check_file_keys(named.data)]
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


def _check_hub_keys(data: Data, entry: DatasetEntry) -> list[Problem]:
    """Keys of `[data]` that say which part of a Hugging Face dataset to read."""
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


def _check_file_keys(data: Data) -> list[Problem]:
    """Keys of `[data]` that say how text files are read."""
    problems = []
    separator = data.document_separator
    if separator is not None and not 0 < len(separator) <= _LONGEST_SEPARATOR:
        problem = f"has {len(separator)} characters"
        fix = f"give 1 to {_LONGEST_SEPARATOR}, or remove it"
        problems.append(Problem("data.document_separator", problem, fix, value=separator))
    if data.encoding is not None and not _is_text_codec(data.encoding):
        fix = 'name one of Python, such as "latin-1", "cp1252", "utf-16" or "gb18030"'
        problems.append(Problem("data.encoding", "is no encoding of text", fix, data.encoding))
    return problems


def _is_text_codec(name: str) -> bool:
    try:  # others change bytes into bytes, such as "zip" and "hex"
        return isinstance(codecs.getincrementaldecoder(name)().decode(b"", True), str)
    except (LookupError, TypeError, ValueError):
        return False


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
        return check_prefetching(options, "training.dataloader")
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


def check_prefetching(options: Dataloader, place: str) -> list[Problem]:
    """The problem of reading ahead without anybody to do it, in the table at `place`."""
    if options.num_workers or options.prefetch_factor is None:
        return []
    return [
        Problem(
            f"{place}.prefetch_factor",
            "nothing is read ahead without reading processes",
            f"remove it, or set {place}.num_workers above 0",
            value=options.prefetch_factor,
            severity="warning",
        )
    ]


def _divisors(number: int) -> list[int]:
    small = [n for n in range(1, math.isqrt(number) + 1) if number % n == 0]
    return sorted({*small, *(number // n for n in small)})


def _nearest(number: int, candidates: list[int]) -> int:
    return min(candidates, key=lambda candidate: abs(candidate - number))
