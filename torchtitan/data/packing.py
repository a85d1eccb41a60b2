"""Documents become sequences of one length.

The tokens of a lane's documents, each with its start and end token, form one stream. A sample takes
`seq_len + 1` tokens of it and advances by `seq_len`: every token is an input once and, but for the
stream's first, a target once. Cutting documents at the end of a sample wastes nothing; with
`document_mask` what is left of the other documents in a sequence is invisible to a document.
"""

from collections import deque
from collections.abc import Iterator, Sequence
from typing import Any, NamedTuple

import numpy as np
import torch

from torchtitan.data.ledger import DocumentSpan
from torchtitan.models.batch import IGNORE_INDEX, Batch

COUNTS = ("truncated", "dropped", "untrained")
"""Fields of Position that count conversations."""


class Position(NamedTuple):
    """The place of a token in a lane's stream, by which the stream can be entered again."""

    epoch: int = 0
    shard: int = 0
    """Number among the lane's shards of the epoch."""
    block: int = 0
    """Number of the shuffle block in the shard."""
    row: int = 0
    """Number in the order of the block."""
    token: int = 0
    """Tokens of the document that earlier samples have taken."""
    bad_rows: int = 0
    """Rows left out before this place."""
    cursor: str = ""
    """From which the source goes on at the beginning of the block, if it can seek."""
    first_epoch: int = 0
    """Epoch with which the data were begun; above 0 after `data.restart`."""
    taken: int = 0
    """Sequences of the window that begins here which were given (`row_packing.py`)."""
    truncated: int = 0
    """Conversations that were cut before this place, because they are too long."""
    dropped: int = 0
    """Conversations that were left out before this place, because they are too long."""
    untrained: int = 0
    """Conversations without a trained token that were left out before this place."""

    @property
    def counts(self) -> tuple[int, ...]:
        """The counts of conversations, in the order of COUNTS."""
        return self.truncated, self.dropped, self.untrained

    def state(self) -> dict[str, Any]:
        """Return the position as JSON values."""
        state = self._asdict()
        for name in ("first_epoch", *COUNTS, "taken"):
            if not state[name]:
                del state[name]  # an older release can read it
        return state

    def without_cursor(self) -> "Position":
        """Return the same place without a cursor: it is found by reading rows again."""
        return self._replace(cursor="")


class Sample(NamedTuple):
    """Up to `seq_len + 1` consecutive tokens of a lane; small, as it travels between processes."""

    tokens: np.ndarray
    """int32 `[num_tokens]`."""
    lengths: tuple[int, ...]
    """Tokens of each document; sums to num_tokens."""
    parts: tuple[int, ...] = ()
    """Tokens of each stream, one more than it contributes inputs; sums to num_tokens.

    Empty for a sequence of one stream.
    """
    trained: np.ndarray | None = None
    """bool `[num_tokens]`, the tokens that are targets; None for all."""
    spans: tuple[DocumentSpan, ...] = ()
    """Origins of the tokens; the last one of each stream begins the next sequence, too."""

    @property
    def num_inputs(self) -> int:
        """Positions that it takes in a sequence, at most."""
        return len(self.tokens) - len(self.parts)

    def split(self) -> "Iterator[Sample]":
        """Yield the parts, each from one stream."""
        lengths = iter(self.lengths)
        start = 0
        for size in self.parts or (len(self.tokens),):
            own: list[int] = []
            while sum(own) < size:
                own.append(next(lengths))
            place = slice(start, start + size)
            trained = None if self.trained is None else self.trained[place]
            yield Sample(self.tokens[place], tuple(own), trained=trained)
            start += size


class Piece(NamedTuple):
    """A document in a lane's stream, or consecutive tokens of one."""

    position: Position
    """Position of its first token."""
    tokens: np.ndarray
    """int32 `[num_tokens]`."""
    continues: bool = False
    """It goes on with the document of the piece before it."""
    shard: int = 0
    """As in `DocumentSpan`."""
    place: int = 0
    """As in `DocumentSpan`."""


class Packer:
    """Cuts samples from a stream of documents."""

    def __init__(self, documents: Iterator[Piece], seq_len: int):
        self._documents = documents
        self._seq_len = seq_len
        self._pending: deque[Piece] = deque()
        self._num_pending = 0

    def next_sample(self, length: int | None = None) -> tuple[Sample, Position] | None:
        """Return a sample and the position of the next one; None when nothing is left to predict.

        The sample advances by `length` tokens, `seq_len` when None. The last sample may be
        short; the position after it is that of the last token.
        """
        length = self._seq_len if length is None else length
        wanted = length + 1
        while self._num_pending < wanted:
            document = next(self._documents, None)
            if document is None:
                break
            self._pending.append(document)
            self._num_pending += len(document.tokens)
        if self._num_pending < 2:
            return None
        sample = self._peek(wanted)
        self._advance(min(length, self._num_pending - 1))
        return sample, self._pending[0].position

    def _peek(self, wanted: int) -> Sample:
        parts: list[np.ndarray] = []
        lengths: list[int] = []
        spans: list[DocumentSpan] = []
        for piece in self._pending:
            parts.append(piece.tokens[:wanted])
            start, count = piece.position.token, len(parts[-1])
            spans.append(DocumentSpan(0, piece.shard, piece.place, start, count))
            wanted -= len(parts[-1])
            if piece.continues and lengths:
                lengths[-1] += len(parts[-1])
            else:
                lengths.append(len(parts[-1]))
            if wanted == 0:
                break
        return Sample(np.concatenate(parts), tuple(lengths), spans=tuple(spans))

    def _advance(self, count: int) -> None:
        self._num_pending -= count
        while count:
            piece = self._pending[0]
            taken = min(count, len(piece.tokens))
            count -= taken
            if taken == len(piece.tokens):
                self._pending.popleft()
            else:
                position = piece.position._replace(token=piece.position.token + taken)
                self._pending[0] = piece._replace(position=position, tokens=piece.tokens[taken:])


def make_batch(
    samples: Sequence[Sample | None], seq_len: int, document_mask: bool, pad_id: int
) -> Batch:
    """Return the batch `[len(samples), seq_len]`; None (no data left) becomes padding.

    Padding is a document of its own without targets, and so is each part of a sample of several
    parts, with targets: its conversations, or the sides of its pairs, of which the even documents
    are chosen and the odd ones rejected. With `document_mask`, positions restart in every document,
    and the first token of a document is not a target.
    """
    shape = (len(samples), seq_len)
    tokens = np.full(shape, pad_id, dtype=np.int64)
    labels = np.full(shape, IGNORE_INDEX, dtype=np.int64)
    documents = np.zeros(shape, dtype=np.int64)
    positions = np.tile(np.arange(seq_len, dtype=np.int64), (len(samples), 1))
    for b, sample in enumerate(samples):
        if sample is None:
            continue
        end = 0
        for part in sample.split():
            # The last token is an input too where nothing follows, at the end of the data.
            start, last = end, len(part.tokens) - 1
            end = min(start + last + (not sample.parts), seq_len)
            tokens[b, start:end] = part.tokens[: end - start]
            labels[b, start : start + last] = part.tokens[1:]
            if part.trained is not None:
                labels[b, start : start + last][~part.trained[1:]] = IGNORE_INDEX
            borders = start + np.cumsum(part.lengths)
            documents[b, borders[(borders <= end) & (borders < seq_len)]] = 1
            documents[b, start] = start > 0
            if document_mask:
                labels[b, borders[borders <= end] - 1] = IGNORE_INDEX
        if end < seq_len:
            documents[b, end] = 1
        starts = np.flatnonzero(documents[b])
        documents[b] = np.cumsum(documents[b])
        if document_mask:
            positions[b] -= np.concatenate(([0], starts))[documents[b]]
    arrays = {
        "tokens": tokens,
        "labels": labels,
        "positions": positions,
        "document_ids": documents,
    }
    return Batch({name: torch.from_numpy(array) for name, array in arrays.items()})
