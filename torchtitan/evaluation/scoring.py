"""Log-likelihoods of texts, by the runner's forward alone, so on every mesh that trains.

Requests are sorted by length and dealt to the data-parallel ranks in batches. Padding is on the
right, where causal attention never looks. A rank without requests goes on with empty ones, because
forwards are collective.
"""

import hashlib
import logging
import time
from collections.abc import Callable, Sequence
from dataclasses import dataclass
from typing import NamedTuple

import torch
import torch.nn.functional as F
from torch import Tensor, nn

from torchtitan.config.errors import DataError
from torchtitan.distributed.context import DistributedContext
from torchtitan.distributed.parallel_dims import ParallelDims
from torchtitan.loss.vocab_parallel import VocabShard
from torchtitan.models.batch import IGNORE_INDEX, Batch
from torchtitan.parallel.runner import Runner, over_ranks
from torchtitan.utils.dtypes import at_least_float32

logger = logging.getLogger(__name__)

_MOST_LOGITS = 2**25
"""Logits that exist at a time: 128 MiB in float32."""
_SHORTEST = 32
"""Tokens of the shortest row of a compiled model."""
_SECONDS_BETWEEN_LINES = 30


class ScoredText(NamedTuple):
    """Tokens of which the last `num_targets` are predicted, each from all before it."""

    tokens: Sequence[int]
    num_targets: int


class Score(NamedTuple):
    """The natural logarithm of the probability of all targets, and if each is the likeliest."""

    log_likelihood: float
    is_greedy: bool


@dataclass(frozen=True)
class Place:
    """The ranks that answer requests, and how many at once."""

    world: DistributedContext
    dims: ParallelDims
    batch_size: int
    """Requests of a data-parallel rank in one forward."""
    max_seq_len: int
    """The most tokens that the model reads; earlier ones are left out."""
    check_stop: Callable[[], None] = lambda: None
    """Called by all ranks between two batches; may raise on all of them."""

    @property
    def requests_at_once(self) -> int:
        """Requests of all ranks in one forward."""
        return self.batch_size * self.dims.dp

    def require_same(self, value: object) -> None:
        """Raise DataError, on all ranks, unless the `repr` of `value` is the same on all."""
        digest = hashlib.sha256(repr(value).encode()).hexdigest()
        if len(set(self.world.gather_json(digest))) > 1:
            raise DataError("the ranks see different tasks; every machine must see the same files")

    def progress(self, what: str, total: int) -> "Callable[[int], None]":
        """Return what reports the number of requests done, where it takes long."""
        logged = time.monotonic()

        def report(done: int) -> None:
            nonlocal logged
            if time.monotonic() - logged > _SECONDS_BETWEEN_LINES:
                logged = time.monotonic()
                logger.info("Evaluating: %s of %s %s", f"{done:,}", f"{total:,}", what)

        return report


class Scorer:
    """Computes log-likelihoods with a runner. All ranks call it with the same texts."""

    def __init__(
        self,
        runner: Runner,
        place: Place,
        shard: VocabShard | None = None,
        is_compiled: bool = False,
    ):
        """Keep what a forward needs.

        `shard` is this rank's part of the vocabulary under tensor parallelism. A model that
        `is_compiled` gets sequences of few lengths.
        """
        self._runner, self._place, self._shard = runner, place, shard
        self._is_compiled = is_compiled

    def score(self, texts: Sequence[ScoredText]) -> list[Score]:
        """Return the scores, in order. Raises DataError if the ranks have different texts."""
        place, dims = self._place, self._place.dims
        place.require_same([[*text.tokens, text.num_targets] for text in texts])
        device = place.world.device
        sums = _TargetSums(len(texts), self._shard, device)
        order = sorted(range(len(texts)), key=lambda n: -len(texts[n].tokens))
        report = place.progress("texts", len(texts))
        for begin in range(0, len(order), place.requests_at_once):
            place.check_stop()
            chosen = order[begin : begin + place.requests_at_once]
            mine = chosen[dims.dp_rank(place.world.rank) :: dims.dp]
            rows = -(-min(len(order), place.requests_at_once) // dims.dp)
            longest = len(texts[chosen[0]].tokens) - 1
            batch = self._batch([(n, texts[n]) for n in mine], rows, self._length(longest))
            self._runner.evaluate([batch], sums)
            report(begin + len(chosen))
        table = over_ranks(sums.table, dims.is_loss_leader(place.world.rank)).tolist()
        return [Score(total, misses == 0) for total, misses in table]

    def _length(self, longest: int) -> int:
        """Return the length of rows for texts of this length, which the mesh can cut."""
        dims = self._place.dims
        unit = dims.tp * (2 * dims.cp if dims.cp > 1 else 1)
        if self._is_compiled:
            longest = max(_SHORTEST, 1 << (longest - 1).bit_length())
            longest = min(longest, self._place.max_seq_len)
        return -(-max(longest, 1) // unit) * unit

    def _batch(self, texts: list[tuple[int, ScoredText]], rows: int, length: int) -> Batch:
        tokens = torch.zeros(rows, length, dtype=torch.int64)
        labels = torch.full_like(tokens, IGNORE_INDEX)
        numbers = torch.zeros(rows, dtype=torch.int64)
        for row, (number, text) in enumerate(texts):
            ids, last = torch.tensor(text.tokens), len(text.tokens) - 1
            tokens[row, :last] = ids[:-1]
            labels[row, last - text.num_targets : last] = ids[len(ids) - text.num_targets :]
            numbers[row] = number
        positions = torch.arange(length).expand(rows, length).contiguous()
        return Batch(
            tokens=tokens,
            labels=labels,
            positions=positions,
            document_ids=torch.zeros_like(tokens),
            text_numbers=numbers,
        )


class _TargetSums:
    """Sums over the targets of each text, collected where a loss would be. A `Loss`.

    `table`, float64 `[texts, 2]`: log-probabilities, and targets that are not the likeliest token.
    """

    def __init__(self, num_texts: int, shard: VocabShard | None, device: torch.device):
        self.table = torch.zeros(num_texts, 2, dtype=torch.float64, device=device)
        self._shard = shard

    def count(self, batch: Batch) -> Tensor:
        """Return the number of targets."""
        return (batch["labels"] != IGNORE_INDEX).sum()

    def sum(self, hidden: Tensor, head: nn.Module, batch: Batch) -> Tensor:
        """Add a microbatch to the table; return zero."""
        is_target = batch["labels"] != IGNORE_INDEX
        labels = batch["labels"][is_target]
        numbers = batch["text_numbers"].unsqueeze(1).expand_as(is_target)[is_target]

        def consume(hidden: Tensor, weight: Tensor) -> Tensor:
            vocabulary = self._shard.total if self._shard is not None else len(weight)
            size = max(1, _MOST_LOGITS // vocabulary)
            parts = hidden[is_target].split(size), labels.split(size), numbers.split(size)
            for some, of_labels, of_numbers in zip(*parts, strict=True):
                self._add(F.linear(some, weight), of_labels, of_numbers)
            return hidden.new_zeros(())

        return head(hidden, consume)

    def _add(self, logits: Tensor, labels: Tensor, numbers: Tensor) -> None:
        if self._shard is not None:
            logits = self._shard.gather_logits(logits)
        logits = logits.to(at_least_float32(logits.dtype))
        log_probs = -F.cross_entropy(logits, labels, reduction="none")
        misses = logits.argmax(-1) != labels
        self.table.index_add_(0, numbers, torch.stack([log_probs, misses], dim=1).double())
