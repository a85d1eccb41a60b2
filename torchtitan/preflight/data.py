"""Checks of the data and the tokenizer before a run starts."""

import codecs

from torchtitan.config.errors import ConfigError, ConfigIssue, warning
from torchtitan.config.run_context import RunContext
from torchtitan.config.schema import Data, Dataloader
from torchtitan.data.ledger import step_ranges
from torchtitan.data.named_sources import NamedSource, check_sources, named_sources
from torchtitan.data.registry import DatasetEntry, find_dataset, missing_path, unknown_dataset
from torchtitan.models.registry import get_family, model_args
from torchtitan.preflight.chat import check_chat, check_rows_of
from torchtitan.preflight.data_files import check_files
from torchtitan.preflight.mesh import is_mesh
from torchtitan.preflight.tensor_parallel import model_problems
from torchtitan.utils.text import plural

_LONGEST_SEPARATOR = 256
_ROUND_TRIP = "Round trip: 3 words,\n    indented; naïve café, 数学 1234.5!"


def check_static(context: RunContext) -> list[ConfigIssue]:
    """Check config and number of processes; reads no files."""
    issues = check_data(context)
    if is_mesh(context):  # else there are no data ranks to share anything
        issues += [*_check_lanes(context), *_check_workers(context)]
    return issues


def check_data(context: RunContext) -> list[ConfigIssue]:
    """Check the keys that say what is read."""
    config = context.config
    try:
        step_ranges(config.data.skip)
    except ValueError as error:
        fix = 'write steps and ranges, for example ["1200-1300", "1450"]'
        return [ConfigIssue("data.skip", str(error), fix)]
    issues = check_sources(config.training, config.data)
    if issues:
        return issues
    issues += check_chat(context)
    for named in named_sources(config.training, config.data):
        issues += [named.under_own_key(problem) for problem in check_dataset(named)]
    return issues


def check_environment(context: RunContext) -> list[ConfigIssue]:
    """Check the files of tokenizer and data: present, readable, enough, as expected."""
    issues, config = check_tokenizer(context), context.config
    if check_data(context):
        return issues
    return issues + check_files(context, named_sources(config.training, config.data))


def check_tokenizer(context: RunContext, with_model: bool = True) -> list[ConfigIssue]:
    """Check the tokenizer, and whether the model fits it unless `with_model` is false."""
    from torchtitan.data.document_ends import check_ends
    from torchtitan.data.tokenizers import KEY, build_tokenizer

    path = context.config.model.tokenizer_path
    try:
        tokenizer = build_tokenizer(path)
    except ConfigError as error:
        return error.problems
    issues = _vocabulary_problems(context, tokenizer.vocab_size) if with_model else []
    issues += check_ends(tokenizer, context.config.data)
    back = tokenizer.decode(tokenizer.encode(_ROUND_TRIP, bos=False, eos=False))
    if back != _ROUND_TRIP:
        text = f"does not give back the text that it encodes: {_ROUND_TRIP!r} becomes {back!r}"
        fix = "check that it suits your text; ignore this if it folds case or blanks on purpose"
        issues.append(warning(KEY, text, fix, path))
    return issues


def _vocabulary_problems(context: RunContext, vocab_size: int) -> list[ConfigIssue]:
    """Return issues of the model that come with the tokenizer's vocabulary."""
    model = context.config.model
    if model_args(model) is None:
        return []  # reported by the check of the model
    try:
        return model_problems(context, get_family(model.name).resolve(model, vocab_size))
    except ConfigError as error:
        return error.problems


def check_dataset(named: NamedSource) -> list[ConfigIssue]:
    """Check one dataset; issues have the keys of a single dataset."""
    training = named.training
    entry = find_dataset(training.dataset)
    if entry is None:
        return [unknown_dataset(training.dataset)]
    issues = [*_check_hub_keys(named.data, entry), *_check_file_keys(named.data)]
    issues += check_rows_of(named.data)
    path = training.dataset_path
    if path is None:
        return [*issues, *([missing_path(training.dataset)] if entry.needs_path else [])]
    if not path or "\0" in path:
        fix = "give a file, a folder or a glob"
        issues.append(ConfigIssue("training.dataset_path", "is not a path", fix, value=path))
    elif not entry.takes_path:
        fix = 'remove it, or set dataset to "auto", "json", "text" or "parquet"'
        problem = f'is not used by "{training.dataset}"'
        issues.append(ConfigIssue("training.dataset_path", problem, fix, value=path))
    return issues


def _check_hub_keys(data: Data, entry: DatasetEntry) -> list[ConfigIssue]:
    """Check the keys that select a part of a Hugging Face dataset."""
    used = {"split": entry.takes_split}
    used |= dict.fromkeys(("subset", "revision", "streaming"), entry.takes_hub_keys)
    issues = []
    for name, is_used in used.items():
        value = getattr(data, name)
        if not is_used and value != type(data).model_fields[name].default:
            problem = f'is not used by "{entry.name}"'
            fix = 'remove it; it is for dataset = "hf:owner/name"'
            issues.append(ConfigIssue(f"data.{name}", problem, fix, value=value))
        elif value == "":
            fix = "name one, or remove it"
            issues.append(ConfigIssue(f"data.{name}", "is empty", fix, value=value))
    return issues


def _check_file_keys(data: Data) -> list[ConfigIssue]:
    """Check the keys that say how text files are read."""
    issues = []
    separator = data.document_separator
    if separator is not None and not 0 < len(separator) <= _LONGEST_SEPARATOR:
        problem = f"has {len(separator)} characters"
        fix = f"give 1 to {_LONGEST_SEPARATOR}, or remove it"
        issues.append(ConfigIssue("data.document_separator", problem, fix, value=separator))
    if data.encoding is not None and not _is_text_codec(data.encoding):
        fix = 'name one of Python, such as "latin-1", "cp1252", "utf-16" or "gb18030"'
        issues.append(ConfigIssue("data.encoding", "is no encoding of text", fix, data.encoding))
    return issues


def _is_text_codec(name: str) -> bool:
    try:  # some codecs change bytes into bytes, such as "zip" and "hex"
        return isinstance(codecs.getincrementaldecoder(name)().decode(b"", True), str)
    except (LookupError, TypeError, ValueError):
        return False


def _check_lanes(context: RunContext) -> list[ConfigIssue]:
    """Check that every lane gives each step, and every rank serves, the same share."""
    lanes, dp, batch = context.num_lanes, context.dp_degree, context.global_batch_size
    issues = []
    if batch % lanes:
        problem = f"does not divide the global batch of {batch} sequences"
        issues.append(ConfigIssue("data.lanes", problem, f"set a divisor of {batch}", lanes))
    if lanes % dp:
        origin = "" if context.config.data.lanes else " (chosen from training.global_batch_size)"
        problem = f"{plural(lanes, 'lane')}{origin} cannot be shared by {dp} data-parallel ranks"
        fix = f"set training.global_batch_size to a multiple of {dp}, and data.lanes, too, if set"
        issues.append(ConfigIssue("data.lanes", problem, fix, context.config.data.lanes))
    return issues


def _check_workers(context: RunContext) -> list[ConfigIssue]:
    options = context.config.training.dataloader
    if options.num_workers == 0:
        return check_prefetching(options, "training.dataloader")
    own, rest = divmod(context.num_lanes, context.dp_degree)
    if rest or own % options.num_workers == 0:
        return []
    problem = f"does not divide the {own} data lanes of a rank, so fewer processes serve them"
    fix = f"set a divisor of {own}"
    return [warning("training.dataloader.num_workers", problem, fix, options.num_workers)]


def check_prefetching(options: Dataloader, place: str) -> list[ConfigIssue]:
    """Warn of prefetching without worker processes, in the table at `place`."""
    if options.num_workers or options.prefetch_factor is None:
        return []
    problem = "nothing is read ahead without worker processes"
    fix = f"remove it, or set {place}.num_workers above 0"
    return [warning(f"{place}.prefetch_factor", problem, fix, options.prefetch_factor)]
