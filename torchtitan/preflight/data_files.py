"""Checks of the data's files before a run starts."""

import os
import pickle
import re
from collections import Counter
from collections.abc import Iterator
from dataclasses import replace
from itertools import islice
from typing import TYPE_CHECKING

from torchtitan.config.errors import ConfigError, ConfigIssue, DataError, warning
from torchtitan.config.run_context import RunContext
from torchtitan.config.schema import Data
from torchtitan.data.decode import DAMAGED_FILE
from torchtitan.data.named_sources import NamedSource
from torchtitan.data.pieces import Shard, too_few_shards
from torchtitan.data.registry import build_source
from torchtitan.preflight.chat import open_encoder
from torchtitan.utils.remote import RemoteError, RemoteFolder, is_remote

if TYPE_CHECKING:
    from torchtitan.data.files import FileSource
    from torchtitan.data.sources import Source
    from torchtitan.data.token_source import TokenSource

_SAMPLED_SHARDS = 16
_SAMPLED_ROWS = 8
_SAMPLED_BYTES = 32 * 2**20
_SAMPLED_ROW_BYTES = 256 * 2**20
"""Content of compressed files that is read."""
_SAMPLED_TOKEN_BYTES = 256 * 2**20
"""Read to compare digests: the offsets of many tokens, and all of small data."""
_COMPARED_FILES = 20_000
_SHOWN_PAIRS = 3
_NOTED_BYTES, _NOTED_SHARE = 2**16, 0.01
"""A file of this size, or this share of the data, is worth a warning: source code, for example,
has many small files that are equal."""
_COMMIT = re.compile(r"[0-9a-f]{40}")
_SKIP = 'set data.on_bad_row = "skip" to leave such rows out'


def check_files(
    context: RunContext, sources: list[NamedSource], earlier: list[NamedSource] | None = None
) -> list[ConfigIssue]:
    """Check the files of sources whose keys are sound, and of `earlier` ones for the same files."""
    issues: list[ConfigIssue] = []
    files = _files_of(earlier or [])
    for named in sources:
        data = named.data if context.full else _lightly(named.data)
        config = context.config.model_copy(update={"training": named.training, "data": data})
        own = replace(context, config=config)
        found: list[ConfigIssue] = []
        if is_left_out(named, context.full):
            issues += map(named.under_own_key, _check_listing(named.training.dataset_path or ""))
            continue
        try:
            source = build_source(named.training, data)
            found += _source_problems(own, source)
            if files or len(sources) > 1:  # else there is none to share a file with
                found += _check_shared_files(named, source, files)
            if named.training.dataset_path is not None:  # else the user did not choose the files
                found += _doubled_files(source)
        except ConfigError as error:
            found += error.problems
        except DataError as error:
            found.append(ConfigIssue(_key(own), str(error), "correct or replace the file"))
        issues += [named.under_own_key(problem) for problem in found]
    return issues


def is_left_out(named: NamedSource, full: bool) -> bool:
    """Return whether a check leaves data alone that only the machine which trains downloads."""
    return not full and is_remote(named.training.dataset_path or "")


def _check_listing(url: str) -> list[ConfigIssue]:
    """Check that an object store has files there."""
    key, fix = "training.dataset_path", "check the path, the credentials and the network"
    try:
        problem = "" if RemoteFolder(url).files() else "no file is there"
    except RemoteError as error:
        problem = str(error)
    return [replace(ConfigIssue(key, problem, fix, url), missing_asset=True)] if problem else []


def _lightly(data: Data) -> Data:
    """Return settings that read a few rows of a hub dataset, for a machine that will not train.

    A check must not download all of it. Part of a split, "train[:10%]", cannot be checked then.
    """
    return data.model_copy(update={"streaming": True, "split": data.split.partition("[")[0]})


def _files_of(sources: list[NamedSource]) -> dict[str, NamedSource]:
    """Return the files of those sources that have files, by their real paths."""
    files: dict[str, NamedSource] = {}
    for named in sources:
        if named.training.dataset_path is None and named.training.dataset != "stdlib":
            continue  # of the hub, or of a kind that only its factory knows
        try:
            source = build_source(named.training, named.data)
        except (ConfigError, DataError):
            continue  # the check of these sources reports it
        for file in getattr(source, "files", ()):
            files.setdefault(os.path.realpath(file.path), named)
    return files


def _check_shared_files(
    named: NamedSource, source: "Source", files: dict[str, NamedSource]
) -> list[ConfigIssue]:
    """Warn of a file that is in an earlier source, too; `files` are those seen so far."""
    paths = [os.path.realpath(file.path) for file in getattr(source, "files", ())]
    shared = [path for path in paths if path in files]
    for path in paths:
        files.setdefault(path, named)
    if not shared:
        return []
    first = files[shared[0]]
    place = f"{first.place} ({first.name})" if first.place else "the training data"
    text = f"{len(shared)} of the files are in {place}, too, for example {shared[0]}"
    fix = "leave them out of one of the sources, unless their documents are to count in both"
    return [warning("training.dataset_path", text, fix, named.training.dataset_path)]


def _source_problems(context: RunContext, source: "Source") -> list[ConfigIssue]:
    """Check that there is data for all lanes, the first rows, and truncated files."""
    from torchtitan.data.files import FileSource
    from torchtitan.data.token_source import TokenSource

    issues = [*getattr(source, "problems", list)(), *_check_pickling(context, source)]
    if issues:
        return issues
    shards = source.shards(context.num_lanes)
    if not shards:
        return [ConfigIssue(_key(context), "holds no document", "give data with content")]
    if len(shards) < context.num_lanes:
        return [too_few_shards(len(shards), context.num_lanes, context.config.data.lanes)]
    is_chat = context.config.data.format != "text"
    if is_chat and not hasattr(source, "record"):
        fix = 'give JSON, Parquet or a dataset with columns, or set data.format = "text"'
        problem = f"format {context.config.data.format!r} needs columns, and these data have none"
        return [ConfigIssue("data.format", problem, fix, context.config.data.format)]
    if isinstance(source, TokenSource):
        return _check_tokens(context, source)
    issues = _check_rows(context, source, shards)
    is_rejected = any(problem.severity == "error" for problem in issues)
    if not is_rejected and isinstance(source, FileSource):
        if not is_chat and not any(file.compression for file in source.files):
            issues += _check_amount(context, sum(file.size for file in source.files), "bytes")
        return issues + _check_whole_files(context, source, shards)
    if not is_rejected:
        issues += _check_shared_rows(context, source, shards)
    return issues + _check_revision(context, source)


def _check_pickling(context: RunContext, source: "Source") -> list[ConfigIssue]:
    """Check that worker processes can have a copy of a dataset from outside the library."""
    from torchtitan.data.files import FileSource

    num_workers = context.config.training.dataloader.num_workers
    if num_workers == 0 or isinstance(source, FileSource):
        return []
    try:
        pickle.dumps(source)
    except Exception as error:
        text = f"the dataset cannot be sent to worker processes: {error}"
        fix = "make it picklable (no open files, lambdas or local classes), or set 0"
        return [ConfigIssue("training.dataloader.num_workers", text, fix, num_workers)]
    return []


def _check_revision(context: RunContext, source: "Source") -> list[ConfigIssue]:
    """Warn of a hub dataset that may change while a run is stopped: a resume is then rejected."""
    commit, revision = source.description.get("commit"), context.config.data.revision
    if commit is None or _COMMIT.fullmatch(revision or ""):
        return []
    text = "the dataset may change; a resume with other training data is rejected"
    return [warning("data.revision", text, f'set "{commit}", the newest commit', revision)]


def _check_tokens(context: RunContext, source: "TokenSource") -> list[ConfigIssue]:
    """Check tokens: made by this tokenizer, undamaged, enough for a step."""
    from torchtitan.data.document_ends import document_tokenizer
    from torchtitan.data.token_files import TokenFileError, check_digests
    from torchtitan.data.token_source import tokenizer_problem, unusable
    from torchtitan.data.tokenizers import build_tokenizer

    config, path = context.config, context.config.training.dataset_path
    try:
        tokenizer = build_tokenizer(config.model.tokenizer_path)
        problem = tokenizer_problem(source, document_tokenizer(tokenizer, config.data), path)
        check_digests(source.folder, source.index, _SAMPLED_TOKEN_BYTES)
    except TokenFileError as error:
        return [unusable(error, path or "")]
    except ConfigError:  # reported by the check of the tokenizer
        return []
    found = [] if problem is None else [problem]
    return found + _check_amount(context, source.index.num_tokens, "tokens")


def _check_rows(context: RunContext, source: "Source", shards: list[Shard]) -> list[ConfigIssue]:
    """Check the first rows of some shards.

    The first unusable row is an error where the policy for rows makes it one. Rows without any
    text get a warning.
    """
    from torchtitan.data.sources import BadRow, row_record
    from torchtitan.data.sources_torch import StreamSource

    data, encoder, notes = context.config.data, None, list[ConfigIssue]()
    if data.format != "text":
        encoder, notes = open_encoder(context, data)
        if encoder is None:
            return notes

    # Each part of a stream may need a separate connection.
    num_sampled = 1 if isinstance(source, StreamSource) else _SAMPLED_SHARDS
    num_usable = 0
    first: tuple[str, BadRow] | None = None
    for shard in shards[:: -(-len(shards) // num_sampled)]:
        for row in islice(source.rows(shard), _SAMPLED_ROWS):
            try:
                if encoder is None:
                    num_usable += len(source.text(row)) > 0
                else:
                    num_usable += len(encoder.encode(row_record(source, row)).units) > 0
            except BadRow as error:
                first = first or (source.locate(shard, row), error)
            if row.flaw:  # what comes after it may be far away
                break
    may_skip = data.on_bad_row == "skip"
    if num_usable and (first is None or may_skip):
        return notes
    if first is None:
        fix = "check that these are the right data"
        what = "hold no text" if encoder is None else "hold nothing that is trained"
        return [*notes, warning(_key(context), f"the first rows {what}", fix)]
    where, reason = first
    issue = ConfigIssue(_key(context), f"{where}: {reason}", _fix_of(str(reason)))
    if reason.column is not None and not num_usable:
        fix = "set it to the column that holds the text" + f", or {_SKIP}" * (not may_skip)
        issue = ConfigIssue("data.text_column", issue.problem, fix, reason.column)
        if encoder is not None:
            fix = "correct it, or name the columns of these data in data.columns"
            issue = ConfigIssue("data.format", issue.problem, fix, data.format)
    return [*notes, replace(issue, severity="warning" if may_skip else "error")]


def _fix_of(flaw: str) -> str:
    if "data.encoding" in flaw:
        return f"set data.encoding, or encoding in its table, or {_SKIP}"
    return f"{'fetch the file again' if DAMAGED_FILE in flaw else 'correct the row'}, or {_SKIP}"


def _check_amount(context: RunContext, amount: int, unit: str) -> list[ConfigIssue]:
    """Check that finite data can fill one step; a token is at least a byte."""
    training, epochs = context.config.training, context.config.data.epochs
    if epochs is None or amount * epochs // training.seq_len >= context.global_batch_size:
        return []
    text = (
        f"{epochs} x {amount} {unit} give at most {amount * epochs // training.seq_len} sequences"
        f" of {training.seq_len} tokens, and a step takes {context.global_batch_size}"
    )
    fix = "give more data, or lower training.global_batch_size or training.seq_len"
    return [ConfigIssue("data.epochs", text, fix, epochs)]


def _check_whole_files(
    context: RunContext, source: "FileSource", shards: list[Shard]
) -> list[ConfigIssue]:
    """Read small files that are not cut into ranges to their end: enough rows, not truncated."""
    budget, budget_of_rows = _SAMPLED_BYTES, _SAMPLED_ROW_BYTES
    issues = []
    strides = {shard.file: shard.stride for shard in shards if shard.end is None}
    num_filled = sum(shard.end is not None for shard in shards)
    for index, stride in strides.items():
        file = source.files[index]
        budget -= file.size
        num_rows = 0
        for row in source.rows(Shard(index)) if budget >= 0 else ():
            num_rows += 1
            budget_of_rows -= row.size
            if row.flaw and context.config.data.on_bad_row == "error":
                where = source.locate(Shard(index), row)
                problem, fix = f"{where}: {row.flaw}", _fix_of(str(row.flaw))
                issues.append(ConfigIssue(_key(context), problem, fix))
                break
            if budget_of_rows < 0:  # a small file can hold any amount
                break
        if budget < 0 or budget_of_rows < 0:
            return issues
        num_filled += min(num_rows, stride)
    if not issues and num_filled == 0:
        return [ConfigIssue(_key(context), "holds no document", "give data with content")]
    if not issues and num_filled < context.num_lanes:
        issues.append(_too_few_documents(num_filled, context))
    return issues


def _check_shared_rows(
    context: RunContext, source: "Source", shards: list[Shard]
) -> list[ConfigIssue]:
    """Check that data whose rows the lanes share by stride have a row for each lane."""
    strides = {shard._replace(offset=0, stride=1): shard.stride for shard in shards}
    if max(strides.values()) == 1 or len(strides) > _SAMPLED_SHARDS:
        return []
    num_filled = 0
    for whole, stride in strides.items():
        num_filled += sum(1 for _ in islice(source.rows(whole), stride))
        if num_filled >= context.num_lanes:
            return []
    return [_too_few_documents(num_filled, context)]


def _too_few_documents(count: int, context: RunContext) -> ConfigIssue:
    return too_few_shards(count, context.num_lanes, context.config.data.lanes, "document")


def _key(context: RunContext) -> str:
    named = context.config.training.dataset_path is None
    return "training.dataset" if named else "training.dataset_path"


def _doubled_files(source: "Source") -> list[ConfigIssue]:
    """Warn of files of a dataset that hold the same documents, with the pairs."""
    listing = getattr(source, "listing", None)
    named = () if listing is None else listing.doubles
    pairs = list(dict.fromkeys((*named, *_same_contents(source))))
    if not pairs:
        return []
    shown = "; ".join(f"{first} and {second}" for first, second in pairs[:_SHOWN_PAIRS])
    more = f"; and {len(pairs) - _SHOWN_PAIRS:,} more pairs" if len(pairs) > _SHOWN_PAIRS else ""
    text = f"seems to hold the same documents twice: {shown}{more}"
    fix = "leave out one of each pair, unless that is meant"
    return [warning("training.dataset_path", text, fix)]


def _same_contents(source: "Source") -> Iterator[tuple[str, str]]:
    """Yield pairs of files of equal size and digest, except small ones."""
    from torchtitan.data.identity import content_digests

    files = getattr(source, "files", ())
    least = min(_NOTED_BYTES, _NOTED_SHARE * sum(file.size for file in files))
    times = Counter(file.size for file in files)
    suspects = [file for file in files if file.size >= least and times[file.size] > 1]
    if len(suspects) > _COMPARED_FILES:
        return
    seen: dict[tuple[int, str], str] = {}
    for file, digest in zip(suspects, content_digests(suspects)):
        first = seen.setdefault((file.size, digest), file.path)
        if first != file.path:
            yield first, file.path
