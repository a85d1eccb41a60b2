"""Read a validation set: each pass gives every sequence once, on any number of ranks.

A set is read in lanes, as training data are, but each lane once, from front to back. The lanes are
dealt to the data-parallel ranks, so the sequences do not depend on the number of ranks; only their
grouping into batches does. A rank that is done goes on with batches without targets until all ranks
are, because forwards are collective.
"""

import hashlib
import json
import logging
import math
from collections.abc import Generator
from dataclasses import dataclass, replace
from itertools import count, islice

from torchtitan.config import ConfigError, ConfigIssue
from torchtitan.config.schema import Training
from torchtitan.data.document_ends import document_tokenizer
from torchtitan.data.loader import LaneReader, StepData, build_named, lane_settings
from torchtitan.data.mixture import Mixture
from torchtitan.data.named_sources import NamedSource, describe_source
from torchtitan.data.packing import Sample
from torchtitan.data.sources import Source
from torchtitan.data.tokenizers import Tokenizer
from torchtitan.utils.text import plural

logger = logging.getLogger(__name__)

_FEWEST_LANES = 8
_MOST_LANES = 64


@dataclass(frozen=True)
class SetReader:
    """One rank's share of a set; made by `build_reader`."""

    name: str
    mixture: Mixture
    training: Training
    """Batch size, mask and worker processes."""
    lanes: range
    """Those of this rank."""
    max_sequences: int | None
    """Sequences of the set to read, over all ranks; None for all."""

    @property
    def num_lanes(self) -> int:
        """Lanes of the set."""
        return self.mixture.sources[0].num_lanes

    @property
    def fingerprint(self) -> str:
        """The digest of the data and how they are cut; it must be the same on all ranks."""
        settings = self.mixture.sources[0]
        facts = {
            "data": settings.description(lambda source: source.description),
            "tokenizer": settings.tokenizer.fingerprint,
            "num_lanes": settings.num_lanes,
            "seq_len": settings.seq_len,
        }
        return hashlib.sha256(json.dumps(facts, sort_keys=True).encode()).hexdigest()

    def start(self) -> "Pass":
        """Begin a pass, to be closed."""
        return Pass(self)


class Pass:
    """A pass over a rank's share of a set, in batches of one size."""

    def __init__(self, of: SetReader):
        self._of = of
        positions = dict.fromkeys(of.lanes, of.mixture.start())
        self._reader = LaneReader(of.mixture, positions, of.training)
        self._samples = self._read()

    def next_step(self, patience: float = math.inf) -> StepData:
        """Return the next batch; at the end, for ever, one without targets that has `ended`.

        Raises DataError, also for a row that takes `patience` seconds to be read.
        """
        self._reader.patience = patience
        size = self._of.training.local_batch_size
        samples = list(islice(self._samples, size))
        missing = [None] * (size - len(samples))
        batch = self._reader.batch([*samples, *missing])
        return StepData([batch], {}, ended=not samples, bad_rows=0)

    def close(self) -> None:
        """End the worker processes; batches that are still asked for are empty."""
        self._samples.close()
        self._reader.close()

    def _read(self) -> Generator[Sample, None, None]:
        """Yield this rank's sequences, lane by lane in rounds. Raises DataError."""
        most, num_lanes = self._of.max_sequences, self._of.num_lanes
        for round_ in count():
            found = False
            for lane in self._of.lanes:
                if most is not None and round_ * num_lanes + lane >= most:
                    break
                sample = next(self._reader).sample
                if sample is not None:
                    found = True
                    yield sample
            if not found:
                return


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
    documents = document_tokenizer(tokenizer, named.data)
    source = build_named(named, documents)
    num_lanes = num_lanes or _default_lanes(source)
    settings = lane_settings(named, source, documents, num_lanes, seed=0)
    settings = replace(settings, shuffle=False, epochs=1, may_be_empty=True)
    if not settings.shards:
        problem = "holds no document", "give data with content"
        raise ConfigError(named.under_own_key(ConfigIssue("training.dataset_path", *problem)))
    idle = max(0, dp_degree - num_lanes)
    waiting = f"; {idle} data-parallel ranks have no share: raise validation.lanes" if idle else ""
    logger.info("Reads %s once in %s%s", named.name, plural(num_lanes, "lane"), waiting)
    if logger.isEnabledFor(logging.INFO):
        logger.info("Reads %s", describe_source(named, source))
    return SetReader(
        named.name,
        Mixture((settings,), (named.name,), (1.0,)),
        named.training,
        # Of few lanes each rank gets one before any gets two, also where only some are read.
        range(dp_rank, num_lanes, dp_degree),
        max_sequences,
    )


def _default_lanes(source: Source) -> int:
    """Return a number of lanes that reads nothing twice, within limits.

    The lower limit gives a few ranks something to do where all data are in one compressed file.
    """
    return min(max(len(source.shards(1)), _FEWEST_LANES), _MOST_LANES)
