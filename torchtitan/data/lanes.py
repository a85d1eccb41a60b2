"""A lane: an independent, deterministic stream of samples with a small state.

In every epoch the shards are put into an order given by (seed, epoch), and lane v of L reads those
at v, v + L, ... of that order; within a shard, documents are shuffled in blocks of bounded size.
A lane does not depend on ranks or processes: whichever process serves it gets the same samples, and
a resume needs only the `Position` that came with the last one.
"""

from collections.abc import Callable, Generator, Iterator, Sequence, Sized
from dataclasses import dataclass
from functools import partial
from typing import Any, TypeVar

import numpy as np

from torchtitan.config import DataError
from torchtitan.data.chat_encoder import ChatEncoder, Encoded, Unit
from torchtitan.data.document_ends import DocumentTokenizer
from torchtitan.data.ledger import DocumentSpan
from torchtitan.data.packing import COUNTS, Packer, Piece, Position, Sample
from torchtitan.data.pieces import Shard
from torchtitan.data.reading import READING, ShardRows, describe_place, persist
from torchtitan.data.row_packing import RowPacker, RowRule, Units
from torchtitan.data.shuffle import combine, permutation
from torchtitan.data.sources import BadRow, Row, SkippedRows, Source, row_record, row_tokens

C = TypeVar("C", bound=Sized)

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
    read_retries: int = 0
    number: int = 0
    """Number among the sources of the mixture."""
    may_be_empty: bool = False
    """A lane without documents has ended; otherwise it is an error."""
    chat: ChatEncoder | None = None
    """Reads rows as conversations, which stay whole; None for text."""
    pad_to_multiple: int | None = None
    """A sequence holds one conversation, padded to a multiple; None: as many as fit."""

    def description(self, describe: Callable[[Source], Any]) -> Any:
        """Return what identifies the data (JSON), with what `describe` says of the source."""
        facts = describe(self.source)
        if self.chat is None:
            return facts
        return {**facts, "chat": self.chat.description, "packing": self.pad_to_multiple is None}


class Lane:
    """The stream of lane `index`, from `position` on."""

    def __init__(self, settings: LaneSettings, index: int, position: Position):
        self.position = position
        """The start of the next sample."""
        self._settings = settings
        self._index = index
        self._skipped = SkippedRows(settings.on_bad_row, settings.max_bad_rows, position.bad_rows)
        self._first_epoch = position.first_epoch
        self._counts = {name: getattr(position, name) for name in COUNTS}
        self._stream: Generator[Any, None, None]
        self._packer: Packer | RowPacker
        if settings.chat is None:
            self._stream = self._documents(position)
            self._packer = Packer(self._stream, settings.seq_len)
        else:
            self._stream = self._conversations(position._replace(taken=0), settings.chat)
            rule = RowRule(settings.seq_len, settings.pad_to_multiple is None, settings.seed)
            self._packer = RowPacker(self._stream, rule, position.taken)

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
        unfinished: Position | None = None
        for here, number, row, tokens in self._contents(start, self._tokens):
            # A piece of a document is a block of its own, so the next piece is the next block.
            after = here.epoch, here.shard, here.block - 1
            continues = (
                not row.begins
                and unfinished is not None
                and (unfinished.epoch, unfinished.shard, unfinished.block) == after
            )
            is_shared = self._settings.shards[number].stride > 1
            unfinished = None if row.ends or is_shared else here
            yield Piece(here, tokens[here.token :], continues, number, row.place)

    def _conversations(self, start: Position, chat: ChatEncoder) -> Generator[Units, None, None]:
        def encode(row: Row) -> Sequence[Unit]:
            return self._counted(chat.encode(row_record(self._settings.source, row)))

        for here, shard, row, units in self._contents(start, encode):
            spans = (
                DocumentSpan(0, shard, row.place, number, len(unit.tokens))
                for number, unit in enumerate(units)
            )
            yield Units(here, tuple(u._replace(span=span) for u, span in zip(units, spans)))

    def _contents(
        self, start: Position, read: Callable[[Row], C | None]
    ) -> Iterator[tuple[Position, int, Row, C]]:
        """Yield the rows from `start` on, with what `read` makes of them, unless it is empty.

        Each comes with its position and the number of its shard.
        """
        settings = self._settings
        epoch, num_empty = start.epoch, 0
        while settings.epochs is None or epoch < settings.epochs:
            found = epoch == start.epoch and start != self._start_of(epoch)
            for position, shard, row in self._rows(epoch, start):
                here = position._replace(
                    bad_rows=self._skipped.count, first_epoch=self._first_epoch, **self._counts
                )
                content = self._read(shard, row, epoch, read)
                if content is None or not len(content):
                    continue
                found = True
                yield here, shard, row, content
            num_empty = 0 if found else num_empty + 1
            if num_empty == _MOST_EMPTY_EPOCHS and not settings.may_be_empty:
                raise DataError(
                    f"data lane {self._index} of {settings.num_lanes} found no document in"
                    f" {num_empty} epochs up to {epoch}: the data ({len(settings.shards)} parts)"
                    " hold too few documents. Set a smaller data.lanes, or give more data"
                )
            epoch += 1

    def _rows(self, epoch: int, start: Position) -> Iterator[tuple[Position, int, Row]]:
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
            ids = settings.number, shard_index
            rows_of = ShardRows(settings.source, shard, cursor, settings.read_retries, ids)
            blocks = _blocks(rows_of, shard, cursor)
            for block, (cursor, rows) in enumerate(blocks, first):
                if resumed and block < start.block:
                    continue
                resumed = resumed and block == start.block
                order = self._order(len(rows), epoch, shard_index, block)
                for place in range(start.row if resumed else 0, len(rows)):
                    resumed = resumed and place == start.row
                    token = start.token if resumed else 0
                    position = Position(epoch, number, block, place, token, cursor=cursor)
                    yield position, shard_index, rows[order[place]]

    def _start_of(self, epoch: int) -> Position:
        bad_rows, first_epoch = self._skipped.count, self._first_epoch
        return Position(epoch, bad_rows=bad_rows, first_epoch=first_epoch, **self._counts)

    def _order(self, length: int, *key: int) -> np.ndarray:
        if not self._settings.shuffle:
            return np.arange(length)
        return permutation(length, combine(self._settings.seed, *key))

    def _read(self, number: int, row: Row, epoch: int, read: Callable[[Row], C | None]) -> C | None:
        """Return what `read` makes of a row; None for one that is skipped.

        Raises DataError as configured.
        """
        settings, shard = self._settings, self._settings.shards[number]
        self._is_counted = epoch == self._first_epoch
        try:
            if row.content is not None:
                return read(row)
            where = partial(describe_place, settings.source, shard, row.place)
            READING.begin(settings.number, number, row.place)  # it is fetched now
            try:
                return persist(partial(read, row), where, settings.read_retries)
            finally:
                READING.end()
        except BadRow as error:
            # In a later epoch it was counted already: a few rows must not end a run by repeating.
            if self._is_counted or settings.on_bad_row == "error":
                self._skipped.add(f"{settings.source.locate(shard, row)}: {error}")
        return None

    def _tokens(self, row: Row) -> np.ndarray | None:
        return row_tokens(self._settings.source, self._settings.tokenizer, row)

    def _counted(self, encoded: Encoded) -> Sequence[Unit]:
        if self._is_counted:
            for name in COUNTS:
                self._counts[name] += getattr(encoded, name)
        return encoded.units


def _blocks(rows: ShardRows, shard: Shard, cursor: str) -> Iterator[tuple[str, list[Row]]]:
    """Yield shuffle blocks: consecutive rows, few enough for memory, from `cursor` on.

    Each comes with the cursor at which it begins; empty for the first and for sources without
    cursors. Pieces of a document keep their order: each is a block of its own unless lanes
    share the shard.
    """
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
            block, size, cursor = [], 0, rows.cursor()
    if block:
        yield cursor, block
