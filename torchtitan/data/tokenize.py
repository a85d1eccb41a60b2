"""Tokenising a dataset once, by several processes, into files that a run maps into memory.

The pieces into which the lanes' source is cut are put together to output shards of some size: a
function of the data and the number of lanes. Each shard is made by one process from its own pieces
alone, so the number of processes changes nothing in the output, and a shard that is finished stays
so when the work is interrupted. No torch.
"""

import hashlib
import json
import multiprocessing
import signal
from collections.abc import Callable, Iterator, Sequence
from concurrent.futures import Future, ProcessPoolExecutor, as_completed
from concurrent.futures.process import BrokenProcessPool
from dataclasses import dataclass
from pathlib import Path

import numpy as np

from torchtitan.config import DataError
from torchtitan.data.document_ends import DocumentTokenizer
from torchtitan.data.files import FileSource
from torchtitan.data.pieces import Shard
from torchtitan.data.reading import ShardRows
from torchtitan.data.sources import BadRow, SkippedRows, Source, row_tokens
from torchtitan.data.sources_parquet import ParquetSource
from torchtitan.data.token_files import (
    FORMAT,
    INDEX_NAME,
    JOB_NAME,
    VERSION,
    Document,
    ShardInfo,
    TokenIndex,
    finished_shard,
    token_dtype,
    write_shard,
)
from torchtitan.utils.files import write_atomically
from torchtitan.utils.processes import end_with_parent, worker_context

_MIN_SHARDS = 64
"""Data are cut into at least so many shards, down to `_SMALLEST_BYTES`, for processes to share."""
_SMALLEST_BYTES = 2**18
_GUESSED_ROW_BYTES = 2**10
_GUESSED_PART_BYTES = 2**28
"""Guessed size of a part of a stream; it may be as large as a file of C4."""


@dataclass(frozen=True)
class TokenizeJob:
    """The work to do. Picklable, for the processes."""

    source: Source
    tokenizer: DocumentTokenizer
    num_lanes: int
    groups: tuple[tuple[Shard, ...], ...]
    """The pieces of the source that each output shard is made of."""
    max_document_mib: float
    on_bad_row: str
    max_bad_rows: int
    folder: Path
    read_retries: int = 0

    @property
    def id(self) -> str:
        """The same for work that can be shared: a stopped job goes on where this is equal."""
        facts = {
            "version": VERSION,
            "source": self.source.description,
            "tokenizer": self.tokenizer.fingerprint,
            "num_lanes": self.num_lanes,
            "groups": [len(group) for group in self.groups],
            "max_document_mib": self.max_document_mib,
        }
        return hashlib.sha256(json.dumps(facts, sort_keys=True).encode()).hexdigest()

    @property
    def dtype(self) -> str:
        """Type of the stored tokens."""
        return token_dtype(self.tokenizer.vocab_size)


def group_pieces(
    source: Source, pieces: Sequence[Shard], largest_bytes: int
) -> tuple[tuple[Shard, ...], ...]:
    """Consecutive pieces in groups of up to about `largest_bytes`, with many groups to share."""
    sizes = [piece_bytes(source, piece) for piece in pieces]
    wanted = min(max(sum(sizes) // _MIN_SHARDS, _SMALLEST_BYTES), largest_bytes)
    groups: list[list[Shard]] = []
    filled = wanted
    for piece, size in zip(pieces, sizes):
        if filled >= wanted:
            groups.append([])
            filled = 0
        groups[-1].append(piece)
        filled += size
    return tuple(tuple(group) for group in groups)


def piece_bytes(source: Source, piece: Shard) -> int:
    """Bytes on the disk of a piece, about; a guess where its source does not say."""
    if isinstance(source, FileSource | ParquetSource):
        size = source.num_bytes(piece)
    elif piece.end is None:
        size = _GUESSED_PART_BYTES
    else:
        size = (piece.end - piece.start) * _GUESSED_ROW_BYTES
    return max(1, size // piece.stride)


def tokenize(
    job: TokenizeJob, num_workers: int, on_finished: Callable[[int, ShardInfo], None]
) -> TokenIndex:
    """Write the shards that are missing, and then the index.

    Calls `on_finished(number, shard)` for each shard, finished ones first. Raises DataError;
    shards that are finished by then stay.
    """
    write_atomically(job.folder / JOB_NAME, json.dumps({"format": FORMAT, "job": job.id}) + "\n")
    found: dict[int, ShardInfo] = {}

    def finish(number: int, shard: ShardInfo) -> None:
        found[number] = shard
        on_finished(number, shard)
        bad_rows = sum(shard.bad_rows for shard in found.values())
        if bad_rows > job.max_bad_rows:
            raise DataError(
                f"left out {bad_rows} rows, more than data.max_bad_rows = {job.max_bad_rows}"
            )

    missing = []
    for number in range(len(job.groups)):
        shard = finished_shard(job.folder, _name(number), job.dtype, job.id)
        if shard is None:
            missing.append(number)
        else:
            finish(number, shard)
    for number, shard in _made(job, missing, num_workers):
        finish(number, shard)
    index = TokenIndex(
        tokenizer=job.tokenizer.fingerprint,
        dtype=job.dtype,
        vocab_size=job.tokenizer.vocab_size,
        num_lanes=job.num_lanes,
        job=job.id,
        source=job.source.description,
        shards=tuple(found[number] for number in range(len(job.groups))),
    )
    for unfinished in job.folder.glob(".*.unfinished"):
        unfinished.unlink(missing_ok=True)
    write_atomically(job.folder / INDEX_NAME, index.to_json())
    (job.folder / JOB_NAME).unlink(missing_ok=True)
    return index


def _made(
    job: TokenizeJob, numbers: Sequence[int], num_workers: int
) -> Iterator[tuple[int, ShardInfo]]:
    """Shards in the order in which they are finished."""
    num_workers = min(num_workers, len(numbers))
    if num_workers <= 1:
        for number in numbers:
            yield number, _make(job, number)
        return
    before = set(multiprocessing.active_children())
    executor = ProcessPoolExecutor(num_workers, worker_context(), _prepare_worker, (job,))
    done = False
    try:
        futures: dict[Future[ShardInfo], int] = {
            executor.submit(_make_in_worker, number): number for number in numbers
        }
        for future in as_completed(futures):
            yield futures[future], future.result()
        done = True
    except BrokenProcessPool as error:
        raise DataError(
            "a tokenizing process was killed, perhaps for want of memory; the same command goes on"
            " with what is finished, and takes less memory with fewer --workers"
        ) from error
    finally:
        executor.shutdown(wait=done, cancel_futures=True)
        for process in set() if done else set(multiprocessing.active_children()) - before:
            process.kill()  # or this one would wait for the shards that they are at


def _make(job: TokenizeJob, number: int) -> ShardInfo:
    skipped = SkippedRows(job.on_bad_row, job.max_bad_rows)

    def documents(piece: Shard) -> Iterator[Document]:
        for row in ShardRows(job.source, piece, retries=job.read_retries):
            tokens, before = None, skipped.count
            try:
                tokens = row_tokens(job.source, job.tokenizer, row)
            except BadRow as error:
                skipped.add(f"{job.source.locate(piece, row)}: {error}")
            # A row without text is kept as an empty document: the order counts it.
            content = np.empty(0, np.int32) if tokens is None else tokens
            # Pieces that lanes share by stride do not follow each other, so nothing joins them.
            apart = piece.stride > 1
            is_bad = skipped.count > before
            yield Document(content, row.size, is_bad, row.begins or apart, row.ends or apart)

    name = _name(number)
    try:
        write_shard(job.folder, name, job.dtype, map(documents, job.groups[number]), job.id)
    except OSError as error:
        raise DataError(f"{job.folder / name} cannot be written: {error.strerror}") from None
    shard = finished_shard(job.folder, name, job.dtype, job.id)
    if shard is None:
        raise DataError(f"{job.folder / name} was changed while it was written")
    return shard


_job: TokenizeJob | None = None
"""The job of a worker process, sent to it once."""


def _prepare_worker(job: TokenizeJob) -> None:
    global _job
    _job = job
    signal.signal(signal.SIGINT, signal.SIG_IGN)  # for the main process to answer
    end_with_parent()


def _make_in_worker(number: int) -> ShardInfo:
    assert _job is not None
    return _make(_job, number)


def _name(number: int) -> str:
    return f"{number:05}"
