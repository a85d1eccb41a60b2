"""`torchtitan tokenize`: a dataset as files of tokens, which runs read without tokenising."""

import argparse
import os
import pickle
from dataclasses import replace
from pathlib import Path

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
from torchtitan.preflight import report
from torchtitan.preflight.data import check_data, check_tokenizer
from torchtitan.preflight.data_files import check_files
from torchtitan.utils.text import plural


def run(options: argparse.Namespace) -> int:
    """Tokenise; exit status 0 when the folder is complete. Raises ConfigError."""
    config = load_config(options.settings).config
    if problems := import_custom_modules(config):
        raise ConfigError(problems)
    num_workers = options.workers or os.cpu_count() or 1
    context = RunContext(config, 1, "cpu")
    named = _choose(context, options.source)
    data = named.data.model_copy(update={"epochs": None})  # epochs are up to the run
    context = replace(
        context, config=config.model_copy(update={"training": named.training, "data": data})
    )
    folder = Path(expand_path(options.output)).absolute()
    job = _prepare(context, named, folder, options.shard_mib * 2**20)
    if min(num_workers, len(job.groups)) > 1:
        _require_picklable(job, num_workers)
    try:
        folder.mkdir(parents=True, exist_ok=True)
        lock = FolderLock(folder)
    except FolderInUse as error:
        raise _bad_output(folder, str(error), "wait for it") from None
    except OSError as error:
        problem = f"cannot be written: {error.strerror}"
        raise _bad_output(folder, problem, "choose another folder") from None
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
    """Check the config and the data, and describe the work. Raises ConfigError."""
    problems = [*check_tokenizer(context, with_model=False), *check_data(context)]
    if not errors_of(problems):
        sections = context.config.training, context.config.data
        problems += check_files(context, named_sources(*sections))
    problems = [named.under_own_key(problem) for problem in problems]
    errors = errors_of(problems)
    report(problem for problem in problems if problem not in errors)
    if errors:
        raise ConfigError(errors)
    config = context.config
    data_path = Path(config.training.dataset_path or "").resolve()
    if config.training.dataset_path and folder.resolve().is_relative_to(data_path):
        text = f"lies in the data, {data_path}, and would be read as data"
        raise _bad_output(folder, text, "choose a folder outside")
    source = build_source(config.training, config.data)
    if config.data.format != "text":
        text = "conversations are tokenised as they are read: a folder of tokens has no mask"
        fix = "train on the rows themselves; `torchtitan data show` shows them as tokens"
        raise ConfigError(
            named.under_own_key(ConfigIssue("data.format", text, fix, config.data.format))
        )
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
        read_retries=config.data.read_retries,
    )


def _require_picklable(job: TokenizeJob, num_workers: int) -> None:
    """Raise ConfigError if the dataset cannot be copied to processes."""
    try:
        pickle.dumps(job)
    except Exception as error:
        problem = f"the dataset cannot be sent to processes: {error}"
        fix = "make it picklable (no open files, lambdas or local classes), or set --workers 1"
        raise ConfigError(ConfigIssue("--workers", problem, fix, num_workers)) from None


def _finished(job: TokenizeJob) -> TokenIndex | None:
    """Return the index if the folder is complete and every file intact.

    Raises ConfigError for a folder with other tokens, or with files of another origin.
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
            raise _bad_output(folder, str(error), fix) from None
        return index
    names = {path.name for path in folder.iterdir() if not path.name.startswith(".")}
    if names and JOB_NAME not in names:
        problem = f"holds other files, {sorted(names)[0]} for one"
        raise _bad_output(folder, problem, "choose an empty folder")
    if names and job.id not in (folder / JOB_NAME).read_text(encoding="utf-8", errors="replace"):
        problem = "holds unfinished tokens of other data or settings"
        fix = "finish them with the same settings, choose another folder, or remove this one"
        raise _bad_output(folder, problem, fix)
    return None


def _bad_output(folder: Path, problem: str, fix: str) -> ConfigError:
    return ConfigError(ConfigIssue("--output", problem, fix, str(folder)))


def _with_progress(job: TokenizeJob, num_workers: int) -> TokenIndex:
    """Tokenise with a progress bar on a terminal."""
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
    skipped = f", {plural(index.bad_rows, 'row')} left out" if index.bad_rows else ""
    state = "complete already, and every file is intact" if checked else "complete"
    return (
        f"{job.folder} is {state}: {plural(index.num_tokens, 'token')} of"
        f" {plural(index.num_documents, 'document')}"
        f"{skipped}, {plural(len(index.shards), 'shard')} of {index.dtype}, {gib:.3g} GiB, for"
        f" {plural(index.num_lanes, 'data lane')}.\n"
        f"Train on it: --training.dataset tokens --training.dataset_path {job.folder}"
        f" --data.lanes {index.num_lanes}"
    )


def _choose(context: RunContext, name: str | None) -> NamedSource:
    """Return the source to tokenise. Raises ConfigError."""
    sources = named_sources(context.config.training, context.config.data)
    names = [source.name for source in sources]
    if name is not None and (name not in names or not context.config.data.sources):
        fix = did_you_mean(name, names) if context.config.data.sources else "leave it out"
        raise ConfigError(ConfigIssue("--source", "is not one of [[data.sources]]", fix, name))
    if name is None and len(sources) > 1:
        fix = f"add `--source NAME`, one of {', '.join(names)}"
        raise ConfigError(ConfigIssue("--source", "is missing: there are several sources", fix))
    return sources[0 if name is None else names.index(name)]
