"""A lane: an independent, deterministic stream of samples with a small state.

In every epoch the shards are put into an order given by (seed, epoch), and lane v of L reads those
at v, v + L, ... of that order; within a shard, documents are shuffled in blocks of bounded size.
A lane does not depend on ranks or processes: whichever process serves it gets the same samples, and
a resume needs only the `Position` that came with the last one.
"""

from collections.abc import Generator, Iterator, Sequence
from dataclasses import dataclass

import numpy as np

from torchtitan.config import DataError
from torchtitan.data.document_ends import DocumentTokenizer
from torchtitan.data.packing import Packer, Piece, Position, Sample
from torchtitan.data.pieces import Shard
from torchtitan.data.shuffle import combine, permutation
from torchtitan.data.sources import BadRow, Row, SkippedRows, Source, row_tokens

_BLOCK_ROWS = 1024
_BLOCK_BYTES = 2**20
_MOST_EMPTY_EPOCHS = 32
"""In a row. Shards without a document fall to another lane in every epoch, so one is no reason to
stop; so many mean that there is none for this lane."""


@dataclass(frozen=True)
class LaneSettings:
    """The settings that all lanes of a run share."""

    source: Source
    shards: Sequence[Shard]
    tokenizer: DocumentTokenizer
    num_lanes: int
    seq_len: int
    seed: int
    shuffle: bool
    epochs: int | None
    on_bad_row: str
    max_bad_rows: int
    may_be_empty: bool = False
    """A lane without documents has ended; otherwise it is an error."""


class Lane:
    """The stream of lane `index`, from `position` on."""

    def __init__(self, settings: LaneSettings, index: int, position: Position):
        self.position = position
        """The start of the next sample."""
        self._settings = settings
        self._index = index
        self._skipped = SkippedRows(settings.on_bad_row, settings.max_bad_rows, position.bad_rows)
        self._first_epoch = position.first_epoch
        self._stream = self._documents(position)
        self._packer = Packer(self._stream, settings.seq_len)

    def close(self) -> None:
        """Close open files.

        Nothing else would: the stream and the lane reference each other, and training runs
        without the garbage collector.
        """
        self._stream.close()

    def next_sample(self, length: int | None = None) -> Sample | None:
        """Return the next sample, which advances by `length` tokens (None: `seq_len`).

        Returns None, for ever, when `epochs` are over. Raises DataError.
        """
        item = self._packer.next_sample(length)
        if item is None:
            if self.position.epoch != self._settings.epochs:
                # A lane that is entered again has nothing left either.
                epochs = self._settings.epochs or 0
                self.position = self._start_of(epochs)
            return None
        sample, self.position = item
        return sample

    def _documents(self, start: Position) -> Generator[Piece, None, None]:
        settings = self._settings
        epoch, num_empty = start.epoch, 0
        while settings.epochs is None or epoch < settings.epochs:
            found = epoch == start.epoch and start != self._start_of(epoch)
            unfinished: Position | None = None
            for position, shard, row in self._rows(epoch, start):
                here = position._replace(
                    bad_rows=self._skipped.count, first_epoch=self._first_epoch
                )
                tokens = self._tokens(shard, row, epoch)
                if tokens is None or not len(tokens):
                    continue
                found = True
                # A piece of a document is a block of its own, so the next piece is the next block.
                after = here.shard, here.block - 1
                continues = (
                    not row.begins
                    and unfinished is not None
                    and (unfinished.shard, unfinished.block) == after
                )
                unfinished = None if row.ends or shard.stride > 1 else here
                yield Piece(here, tokens[here.token :], continues)
            num_empty = 0 if found else num_empty + 1
            if num_empty == _MOST_EMPTY_EPOCHS and not settings.may_be_empty:
                raise DataError(
                    f"data lane {self._index} of {settings.num_lanes} found no document in"
                    f" {num_empty} epochs up to {epoch}: the data ({len(settings.shards)} parts)"
                    " hold too few documents. Set a smaller data.lanes, or give more data"
                )
            epoch += 1

    def _rows(self, epoch: int, start: Position) -> Iterator[tuple[Position, Shard, Row]]:
        """Yield the rows of an epoch in order, from `start` on if that lies in this epoch."""
        settings = self._settings
        resumed = epoch == start.epoch
        own = self._order(len(settings.shards), epoch)[self._index :: settings.num_lanes]
        for number in range(start.shard if resumed else 0, len(own)):
            shard_index = int(own[number])
            shard = settings.shards[shard_index]
            resumed = resumed and number == start.shard
            # With a cursor the rows begin at the block in which the last run was stopped.
            cursor = start.cursor if resumed else ""
            first = start.block if cursor else 0
            blocks = _blocks(settings.source, shard, cursor)
            for block, (cursor, rows) in enumerate(blocks, first):
                if resumed and block < start.block:
                    continue
                resumed = resumed and block == start.block
                order = self._order(len(rows), epoch, shard_index, block)
                for place in range(start.row if resumed else 0, len(rows)):
                    resumed = resumed and place == start.row
                    token = start.token if resumed else 0
                    position = Position(epoch, number, block, place, token, cursor=cursor)
                    yield position, shard, rows[order[place]]

    def _start_of(self, epoch: int) -> Position:
        return Position(epoch=epoch, bad_rows=self._skipped.count, first_epoch=self._first_epoch)

    def _order(self, length: int, *key: int) -> np.ndarray:
        if not self._settings.shuffle:
            return np.arange(length)
        return permutation(length, combine(self._settings.seed, *key))

    def _tokens(self, shard: Shard, row: Row, epoch: int) -> np.ndarray | None:
        """Return the tokens of a row; None for one without text and for one that is skipped.

        Raises DataError as configured.
        """
        settings = self._settings
        try:
            return row_tokens(settings.source, settings.tokenizer, row)
        except BadRow as error:
            # In a later epoch it was counted already: a few rows must not end a run by repeating.
            if epoch == self._first_epoch or settings.on_bad_row == "error":
                self._skipped.add(f"{settings.source.locate(shard, row)}: {error}")
        return None


def _blocks(source: Source, shard: Shard, cursor: str) -> Iterator[tuple[str, list[Row]]]:
    """Yield shuffle blocks: consecutive rows, few enough for memory, from `cursor` on.

    Each comes with the cursor at which it begins; empty for the first and for sources without
    cursors. Pieces of a document keep their order: each is a block of its own unless lanes
    share the shard.
    """
    rows = source.rows(shard, cursor) if cursor else source.rows(shard)  # type: ignore[call-arg]
    next_cursor = getattr(rows, "cursor", lambda: "")
    block: list[Row] = []
    size = 0
    for row in rows:
        is_piece = not row.is_whole and shard.stride == 1
        if is_piece and block:
            yield cursor, block
            block, size, cursor = [], 0, ""  # its place is behind the row that was read
        block.append(row)
        size += row.size
        if is_piece or len(block) == _BLOCK_ROWS or size >= _BLOCK_BYTES:
            yield cursor, block
            block, size, cursor = [], 0, next_cursor()
    if block:
        yield cursor, block
