"""`torchtitan tokenize`: a dataset as files of tokens, which runs read without tokenising."""

import os
import pickle
from dataclasses import replace
from pathlib import Path
from typing import NamedTuple

from torchtitan.checkpoint.lock import FolderInUse, FolderLock
from torchtitan.config.custom_import import import_custom_modules
from torchtitan.config.errors import ConfigError, ConfigIssue, DataError, errors_of
from torchtitan.config.exit_codes import DONE
from torchtitan.config.load import load_config
from torchtitan.config.paths import expand_path
from torchtitan.config.run_context import RunContext
from torchtitan.config.suggest import did_you_mean
from torchtitan.data.document_ends import document_tokenizer
from torchtitan.data.named_sources import NamedSource, named_sources
from torchtitan.data.registry import build_source
from torchtitan.data.token_files import (
    INDEX_NAME,
    JOB_NAME,
    ShardInfo,
    TokenFileError,
    TokenIndex,
    check_digests,
    check_sizes,
    read_index,
)
from torchtitan.data.token_source import TokenSource
from torchtitan.data.tokenize import TokenizeJob, group_pieces, piece_bytes, tokenize
from torchtitan.data.tokenizers import build_tokenizer
from torchtitan.preflight.data import check_data, check_tokenizer
from torchtitan.preflight.data_files import check_data_files
from torchtitan.preflight.preflight import report

USAGE = """usage: torchtitan tokenize [FILE] --output DIR [--workers N] [--source NAME]
                           [--shard-mib N] [--section.key value ...]

Tokenise the dataset of a config once. A run reads the folder as training.dataset_path, and with the
same data.lanes it sees the samples that it would see in the text. Killed, the same command goes on;
finished, it checks every file.

  --output DIR     folder to write to
  --workers N      processes; the output is the same for every number (default: one a core)
  --source NAME    which of [[data.sources]], where there are several
  --shard-mib N    text for one pair of files, in MiB (default: 256)

The settings that count: training.dataset_path, training.dataset, model.tokenizer_path,
data.text_column, data.encoding, data.document_separator, data.add_bos, data.add_eos, data.lanes,
data.max_document_mib, data.on_bad_row, data.max_bad_rows."""


class _Options(NamedTuple):
    output: str | None
    workers: str | None
    source: str | None
    shard_mib: str | None


def run(argv: list[str]) -> int:
    """Tokenise. Returns exit status 0 when the folder is complete; raises ConfigError."""
    if not argv or "-h" in argv or "--help" in argv:
        print(USAGE)
        return DONE
    options, rest = _split(argv)
    config = load_config(rest).config
    problems = import_custom_modules(config)
    cores = os.cpu_count() or 1
    num_workers = _number("--workers", options.workers, cores, problems)
    shard_mib = _number("--shard-mib", options.shard_mib, 256, problems)
    if not options.output:
        fix = "add `--output DIR`, a folder for the tokens"
        problems.append(ConfigIssue("--output", "is missing", fix))
    if problems:
        raise ConfigError(problems)
    context = RunContext(config, 1, "cpu")
    named = _choose(context, options.source)
    data = named.data.model_copy(update={"epochs": None})  # how often it is read is for the run
    context = replace(
        context, config=config.model_copy(update={"training": named.training, "data": data})
    )
    folder = Path(expand_path(options.output or "")).absolute()
    job = _prepare(context, named, folder, shard_mib * 2**20)
    if min(num_workers, len(job.groups)) > 1:
        _require_picklable(job, num_workers)
    try:
        folder.mkdir(parents=True, exist_ok=True)
        lock = FolderLock(folder)
    except FolderInUse as error:
        raise ConfigError(ConfigIssue("--output", str(error), "wait for it", str(folder))) from None
    except OSError as error:
        problem = f"cannot be written: {error.strerror}"
        raise ConfigError(
            ConfigIssue("--output", problem, "choose another folder", str(folder))
        ) from None
    try:
        index = _finished(job)
        print(_summary(job, index or _with_progress(job, num_workers), checked=index is not None))
    except OSError as error:
        raise DataError(f"{folder} cannot be written: {error.strerror}") from error
    finally:
        lock.release()
    return DONE


def _prepare(
    context: RunContext, named: NamedSource, folder: Path, shard_bytes: int
) -> TokenizeJob:
    """Return the job, after all checks. Raises ConfigError."""
    problems = [*check_tokenizer(context, with_model=False), *check_data(context)]
    if not errors_of(problems):
        problems += check_data_files(context)
    problems = [named.under_own_key(problem) for problem in problems]
    errors = errors_of(problems)
    report(problem for problem in problems if problem not in errors)
    if errors:
        raise ConfigError(errors)
    config = context.config
    data_path = Path(config.training.dataset_path or "").resolve()
    if config.training.dataset_path and folder.resolve().is_relative_to(data_path):
        text = f"lies in the data that are read, {data_path}, and would be taken for data"
        raise ConfigError(ConfigIssue("--output", text, "choose a folder outside it", str(folder)))
    source = build_source(config.training, config.data)
    if isinstance(source, TokenSource):
        problem = ConfigIssue(
            "training.dataset_path",
            "holds tokens already",
            "give text or JSON, or train on it as it is",
            config.training.dataset_path,
        )
        raise ConfigError(named.under_own_key(problem))
    return TokenizeJob(
        source=source,
        tokenizer=document_tokenizer(build_tokenizer(config.model.tokenizer_path), config.data),
        num_lanes=context.num_lanes,
        groups=group_pieces(source, source.shards(context.num_lanes), shard_bytes),
        max_document_mib=config.data.max_document_mib,
        on_bad_row=config.data.on_bad_row,
        max_bad_rows=config.data.max_bad_rows,
        folder=folder,
    )


def _require_picklable(job: TokenizeJob, num_workers: int) -> None:
    """Raises ConfigError for a dataset of which processes cannot have a copy."""
    try:
        pickle.dumps(job)
    except Exception as error:
        problem = f"the dataset cannot be sent to processes: {error}"
        fix = "make it picklable (no open files, lambdas or local classes), or set --workers 1"
        raise ConfigError(ConfigIssue("--workers", problem, fix, num_workers)) from None


def _finished(job: TokenizeJob) -> TokenIndex | None:
    """Return the index if the folder is complete and every file is whole.

    Raises ConfigError for a folder with other tokens, or with foreign files.
    """
    folder = job.folder
    if (folder / INDEX_NAME).exists():
        try:
            index = read_index(folder)
            if index.job != job.id:
                raise TokenFileError("it holds tokens of other data, or of another tokenizer")
            check_sizes(folder, index)
            check_digests(folder, index, float("inf"))
        except TokenFileError as error:
            fix = "choose another folder, or remove this one"
            raise ConfigError(ConfigIssue("--output", str(error), fix, str(folder))) from None
        return index
    names = {path.name for path in folder.iterdir() if not path.name.startswith(".")}
    if names and JOB_NAME not in names:
        problem = f"holds other files, {sorted(names)[0]} for one"
        raise ConfigError(ConfigIssue("--output", problem, "choose an empty folder", str(folder)))
    if names and job.id not in (folder / JOB_NAME).read_text(encoding="utf-8", errors="replace"):
        problem = "holds unfinished tokens of other data or settings"
        fix = "finish them with the same settings, choose another folder, or remove this one"
        raise ConfigError(ConfigIssue("--output", problem, fix, str(folder)))
    return None


def _with_progress(job: TokenizeJob, num_workers: int) -> TokenIndex:
    """`tokenize` with a progress bar on a terminal."""
    from rich import progress as rich
    from rich.console import Console

    sizes = [sum(piece_bytes(job.source, piece) for piece in group) for group in job.groups]
    console = Console(stderr=True)
    columns = (
        rich.BarColumn(),
        rich.TaskProgressColumn(),
        rich.TimeRemainingColumn(),
        rich.TextColumn("{task.fields[tokens]:,} tokens"),
    )
    with rich.Progress(*columns, console=console, disable=not console.is_terminal) as bar:
        task = bar.add_task("", total=sum(sizes), tokens=0)
        num_tokens = 0

        def advance(number: int, shard: ShardInfo) -> None:
            nonlocal num_tokens
            num_tokens += shard.num_tokens
            bar.update(task, advance=sizes[number], tokens=num_tokens)

        return tokenize(job, num_workers, advance)


def _summary(job: TokenizeJob, index: TokenIndex, checked: bool) -> str:
    gib = index.num_tokens * index.token_bytes / 2**30
    skipped = f", {index.bad_rows} rows left out" if index.bad_rows else ""
    state = "complete already, and every file is whole" if checked else "complete"
    return (
        f"{job.folder} is {state}: {index.num_tokens:,} tokens of {index.num_documents:,} documents"
        f"{skipped}, {len(index.shards)} shards of {index.dtype}, {gib:.3g} GiB, for"
        f" {index.num_lanes} data lanes.\n"
        f"Train on it: --training.dataset tokens --training.dataset_path {job.folder}"
        f" --data.lanes {index.num_lanes}"
    )


def _choose(context: RunContext, name: str | None) -> NamedSource:
    """The source to tokenise. Raises ConfigError."""
    sources = named_sources(context.config.training, context.config.data)
    names = [source.name for source in sources]
    if name is not None and (name not in names or not context.config.data.sources):
        fix = did_you_mean(name, names) if context.config.data.sources else "leave it out"
        raise ConfigError(ConfigIssue("--source", "is not one of [[data.sources]]", fix, name))
    if name is None and len(sources) > 1:
        fix = f"add `--source NAME`, one of {', '.join(names)}"
        raise ConfigError(ConfigIssue("--source", "is missing: there are several sources", fix))
    return sources[0 if name is None else names.index(name)]


def _split(argv: list[str]) -> tuple[_Options, list[str]]:
    """The options of this word, and the rest, which is the config's. Raises ConfigError."""
    found: dict[str, str] = {}
    rest: list[str] = []
    arguments = list(argv)
    while arguments:
        argument = arguments.pop(0)
        flag, equals, value = argument.partition("=")
        key = flag.removeprefix("--").replace("-", "_")
        if not flag.startswith("--") or key not in _Options._fields:
            rest.append(argument)
            continue
        if not equals:
            value = arguments.pop(0) if arguments and not arguments[0].startswith("--") else ""
        if not value or found.get(key, value) != value:
            problem = "is given twice" if value else "has no value"
            raise ConfigError(ConfigIssue(flag, problem, f"write `{flag} VALUE` once"))
        found[key] = value
    return _Options(**{name: found.get(name) for name in _Options._fields}), rest


def _number(flag: str, text: str | None, default: int, problems: list[ConfigIssue]) -> int:
    if text is None:
        return default
    if not text.isdecimal() or len(text) > 9 or int(text) == 0:
        problem = "is not a whole number from 1 to 999999999"
        problems.append(ConfigIssue(flag, problem, f"write `{flag} 4`", text))
        return default
    return int(text)
