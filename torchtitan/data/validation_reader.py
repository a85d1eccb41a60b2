"""Reading a validation set: each pass gives every sequence of it once, on any number of ranks.

A set is read in lanes, as training data are, but each lane once, from front to back, until it ends.
The lanes are dealt to the data-parallel ranks, so which sequences there are does not depend on how
many ranks read them; only which rank has them does, and how many fit into a batch. A rank that is
through goes on with batches without a target until all are: forwards are collective.
"""

import hashlib
import json
import logging
from collections.abc import Generator
from itertools import count, islice

import torch

from torchtitan.config import ConfigError, ConfigIssue
from torchtitan.config.schema import Dataloader
from torchtitan.data.document_ends import document_tokenizer
from torchtitan.data.lanes import LaneSettings
from torchtitan.data.loader import StepData, build_named
from torchtitan.data.mixture import Mixture
from torchtitan.data.named_sources import NamedSource
from torchtitan.data.packing import Sample, make_batch
from torchtitan.data.reading import describe_source
from torchtitan.data.sources import Source
from torchtitan.data.tokenizers import Tokenizer
from torchtitan.data.workers import LaneDataset, SampleStream, workers_for

logger = logging.getLogger(__name__)

_FEWEST_LANES = 8
_MOST_LANES = 64


class SetReader:
    """One rank's share of a set; made by `build_reader`."""

    def __init__(
        self,
        settings: LaneSettings,
        name: str,
        *,
        dp_degree: int,
        dp_rank: int,
        local_batch_size: int,
        max_sequences: int | None,
        document_mask: bool,
        options: Dataloader,
    ):
        self.name = name
        self.num_lanes = settings.num_lanes
        self.local_batch_size = local_batch_size
        self.fingerprint = _fingerprint(settings)
        """Names the data and how they are cut; it has to be the same on all ranks."""
        self._mixture = Mixture((settings,), (name,), (1.0,))
        # Of few lanes each rank gets one before any gets two, also where only some are read.
        self._lanes = range(dp_rank, settings.num_lanes, dp_degree)
        self._max_sequences = max_sequences
        self._document_mask = document_mask
        self._options = options

    def start(self) -> "Pass":
        """A pass from the beginning, to be closed."""
        return Pass(self)

    def samples(self) -> Generator[Sample, None, None]:
        """This rank's sequences, lane by lane in rounds. Raises DataError."""
        if not self._lanes:
            return
        dataset = LaneDataset(self._mixture, dict.fromkeys(self._lanes, self._mixture.start()))
        num_workers = workers_for(len(self._lanes), self._options.num_workers)
        stream = SampleStream(dataset, num_workers, self._options.prefetch_factor)
        try:
            for round_ in count():
                found = False
                for lane in self._lanes:
                    if self._is_over(round_ * self.num_lanes + lane):
                        break
                    sample = next(stream).sample
                    if sample is not None:
                        found = True
                        yield sample
                if not found:
                    return
        finally:
            stream.close()

    def batch(self, samples: list[Sample]) -> StepData:
        """`local_batch_size` sequences, of which those that are missing have no targets."""
        pad_id = self._mixture.sources[0].tokenizer.pad_id
        missing = [None] * (self.local_batch_size - len(samples))
        seq_len = self._mixture.sources[0].seq_len
        batch = make_batch([*samples, *missing], seq_len, self._document_mask, pad_id)
        if self._options.pin_memory and torch.cuda.is_available():
            batch = batch.pin_memory()
        return StepData([batch], {}, ended=not samples, bad_rows=0)

    def _is_over(self, place: int) -> bool:
        """Whether the sequence of this number, in rounds over all lanes, is not to be read."""
        return self._max_sequences is not None and place >= self._max_sequences


class Pass:
    """A pass over a rank's share of a set, in batches of one size."""

    def __init__(self, reader: SetReader):
        self._reader = reader
        self._samples = reader.samples()

    def next_step(self) -> StepData:
        """The next batch; when nothing is left, for ever, one without targets that has `ended`."""
        return self._reader.batch(list(islice(self._samples, self._reader.local_batch_size)))

    def close(self) -> None:
        """End the reading processes."""
        self._samples.close()


def build_reader(
    named: NamedSource,
    tokenizer: Tokenizer,
    *,
    num_lanes: int | None,
    max_sequences: int | None,
    dp_degree: int,
    dp_rank: int,
) -> SetReader:
    """The reader of rank `dp_rank` of `dp_degree`. Raises ConfigError, DataError."""
    training, data = named.training, named.data
    documents = document_tokenizer(tokenizer, data)
    source = build_named(named, documents)
    num_lanes = num_lanes or _default_lanes(source)
    shards = source.shards(num_lanes)
    if not shards:
        problem = ConfigIssue(
            "training.dataset_path", "holds no document", "give data with content"
        )
        raise ConfigError(named.retold(problem))
    settings = LaneSettings(
        source=source,
        shards=shards,
        tokenizer=documents,
        num_lanes=num_lanes,
        seq_len=training.seq_len,
        seed=0,
        shuffle=False,
        epochs=1,
        on_bad_row=data.on_bad_row,
        max_bad_rows=data.max_bad_rows,
        may_be_empty=True,
    )
    idle = max(0, dp_degree - num_lanes)
    waiting = f"; {idle} data-parallel ranks have no share: raise validation.lanes" if idle else ""
    logger.info("Validation set %s in %d lanes%s", named.name, num_lanes, waiting)
    logger.info("Reads %s", describe_source(named, source))
    return SetReader(
        settings,
        named.name,
        dp_degree=dp_degree,
        dp_rank=dp_rank,
        local_batch_size=training.local_batch_size,
        max_sequences=max_sequences,
        document_mask=training.document_mask,
        options=training.dataloader,
    )


def _default_lanes(source: Source) -> int:
    """As many as can be read without reading anything twice, within limits: a few ranks should
    have something to do where all is in one compressed file."""
    return min(max(len(source.shards(1)), _FEWEST_LANES), _MOST_LANES)


def _fingerprint(settings: LaneSettings) -> str:
    context = {
        "data": settings.source.description,
        "tokenizer": settings.tokenizer.fingerprint,
        "num_lanes": settings.num_lanes,
        "seq_len": settings.seq_len,
    }
    return hashlib.sha256(json.dumps(context, sort_keys=True).encode()).hexdigest()
