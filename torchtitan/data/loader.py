"""The loader: the microbatches of a step, and where every lane stands after it.

A step takes `global_batch_size / num_lanes` consecutive samples of every lane. A data-parallel rank
serves a consecutive part of the lanes, so the samples of a step are the same for every degree that
divides the number of lanes. A checkpoint stores one small state per lane.
"""

import logging
import math
from collections.abc import Mapping, Sequence
from dataclasses import dataclass, field, replace
from typing import Any

import torch
from torch import Tensor

from torchtitan.config import ConfigError, DataError
from torchtitan.config.schema import Data, Training
from torchtitan.data.chat_encoder import chat_encoder
from torchtitan.data.document_ends import DocumentTokenizer, document_tokenizer
from torchtitan.data.identity import (
    data_facts,
    describe_change,
    fingerprint_of,
    names_data,
    restart,
    summary_of,
)
from torchtitan.data.lanes import LaneSettings
from torchtitan.data.ledger import DocumentSpan, step_ranges
from torchtitan.data.mixture import AnyPosition, Mixture
from torchtitan.data.named_sources import (
    NamedSource,
    describe_amount,
    describe_source,
    named_sources,
)
from torchtitan.data.packing import COUNTS, Sample, make_batch
from torchtitan.data.pieces import too_few_shards
from torchtitan.data.registry import build_source
from torchtitan.data.sample import sequence_text
from torchtitan.data.sources import Source
from torchtitan.data.token_source import tokenizer_problem
from torchtitan.data.tokenizers import Tokenizer
from torchtitan.data.workers import LaneDataset, SampleStream, workers_for
from torchtitan.models.batch import Batch

logger = logging.getLogger(__name__)


@dataclass(frozen=True)
class LanePlan:
    """The lanes that a data-parallel rank serves, and how much of them a step takes."""

    num_lanes: int
    dp_degree: int
    dp_rank: int
    global_batch_size: int
    local_batch_size: int

    def __post_init__(self) -> None:
        # The checks of the config have said so to the user.
        assert self.global_batch_size % self.num_lanes == 0 == self.num_lanes % self.dp_degree
        assert self.global_batch_size % (self.local_batch_size * self.dp_degree) == 0

    @property
    def lanes(self) -> range:
        """The lanes of this rank."""
        count = self.num_lanes // self.dp_degree
        return range(self.dp_rank * count, (self.dp_rank + 1) * count)

    @property
    def samples_per_lane(self) -> int:
        """Samples that a step takes of each lane."""
        return self.global_batch_size // self.num_lanes

    @property
    def num_microbatches(self) -> int:
        """Microbatches of a step on each rank."""
        return self.global_batch_size // (self.local_batch_size * self.dp_degree)


@dataclass(frozen=True)
class StepData:
    """The batches of one rank for one step."""

    microbatches: list[Batch]
    lane_states: dict[int, dict[str, Any]]
    """State of each of this rank's lanes after the step (JSON), some 100 bytes per source."""
    ended: bool
    """Set when all lanes of this rank had ended before the step: it holds padding only."""
    bad_rows: int
    """Rows that this rank's lanes have skipped since the start of the run."""
    counts: tuple[int, ...] = (0,) * len(COUNTS)
    """Conversations that this rank's lanes have changed or left out, in the order of COUNTS."""
    source_tokens: dict[str, int] = field(default_factory=dict)
    """Tokens of each source since the start of the run, over all ranks; empty for one source."""
    data_step: int = 0
    """Steps that the data have given so far, this one and those that were left out included."""
    spans: dict[int, list[tuple[DocumentSpan, ...]]] = field(default_factory=dict)
    """Origins of each sequence of each of this rank's lanes."""


class LaneReader(SampleStream):
    """Samples of some lanes in rounds, and batches of them; training and validation read with it.

    The samples are made ahead in worker processes, or in this process without any.
    """

    def __init__(self, mixture: Mixture, positions: dict[int, AnyPosition], training: Training):
        options = training.dataloader
        self.mixture = mixture
        self.num_workers = workers_for(len(positions), options.num_workers)
        dataset = LaneDataset(mixture, dict(positions), self.num_workers)
        super().__init__(dataset, options.prefetch_factor)
        self._document_mask = training.document_mask
        self._pin_memory = options.pin_memory and torch.cuda.is_available()

    def batch(self, samples: Sequence[Sample | None]) -> Batch:
        """Return the batch `[len(samples), seq_len]`; None becomes padding without targets."""
        settings = self.mixture.sources[0]
        seq_len, pad_id = settings.seq_len, settings.tokenizer.pad_id
        if multiple := self.mixture.pad_to_multiple:
            longest = max((sample.num_inputs for sample in samples if sample), default=1)
            seq_len = min(seq_len, -(-longest // multiple) * multiple)
        batch = make_batch(samples, seq_len, self._document_mask, pad_id)
        return batch.pin_memory() if self._pin_memory else batch


class Loader:
    """The steps of one rank. Made by `build_loader`; not thread-safe."""

    def __init__(
        self,
        reader: LaneReader,
        plan: LanePlan,
        positions: dict[int, AnyPosition],
        change: str = "",
        data_step: int = 0,
        skip: Sequence[range] = (),
    ):
        """`data_step`: steps that the data have given so far; those in `skip` are left out."""
        self.amount = ""
        """The name, files and bytes of the data, for the log; empty on a rank that logs nothing."""
        self.sample: tuple[Tensor, Tensor] | None = None
        """Tokens and labels `[seq_len]` of the first sequence that was read."""
        self.change = change
        """Describes a change of the data since the checkpoint; empty without one."""
        self.data_facts = data_facts(reader.mixture)
        """Everything that a place in the data depends on."""
        self.fingerprint = fingerprint_of(self.data_facts)
        """The digest of `data_facts`."""
        self.data_summary = summary_of(self.data_facts)
        """A short form of `data_facts` (JSON)."""
        self._reader = reader
        self._plan = plan
        self._positions = positions
        self._data_step = data_step
        self._skip = skip

    def next_step(self, patience: float = math.inf) -> StepData:
        """Return the microbatches of the next step, each `[local_batch_size, seq_len]`.

        Every rank of the same data-parallel rank must call it equally often. Raises
        DataError, also for a row that takes `patience` seconds to be read.
        """
        self._reader.patience = patience
        plan = self._plan
        samples = self._next_samples()
        while skipped := [steps for steps in self._skip if self._data_step in steps]:
            if any(samples):
                samples = self._next_samples()
            else:  # at the end of the data, which may be long before that of the range
                self._data_step = skipped[0].stop
        batches = [
            self._reader.batch(samples[start : start + plan.local_batch_size])
            for start in range(0, len(samples), plan.local_batch_size)
        ]
        if self.sample is None:
            self.sample = batches[0]["tokens"][0].clone(), batches[0]["labels"][0].clone()
        states = {lane: position.state() for lane, position in self._positions.items()}
        bad_rows = sum(position.bad_rows for position in self._positions.values())
        counts = tuple(map(sum, zip(*(p.counts for p in self._positions.values()))))
        ended = all(sample is None for sample in samples)
        source_tokens = self._reader.mixture.source_tokens(self._positions[plan.lanes[0]])
        lanes, step = len(plan.lanes), self._data_step
        spans = {
            lane: [sample.spans for sample in samples[number::lanes] if sample is not None]
            for number, lane in enumerate(plan.lanes)
        }
        return StepData(batches, states, ended, bad_rows, counts, source_tokens, step, spans)

    def _next_samples(self) -> list[Sample | None]:
        """Read the samples of the next step of the data."""
        self._data_step += 1
        samples: list[Sample | None] = []
        for _ in range(self._plan.samples_per_lane):
            for lane in self._plan.lanes:
                item = next(self._reader)
                assert item.lane == lane
                samples.append(item.sample)
                self._positions[lane] = item.position
        return samples

    def reading(self) -> str:
        """Return the source, file and row that are being read; empty if none is."""
        return self._reader.reading()

    def sample_text(self, most: int) -> str:
        """Return the text of the first sequence that was read; in chat data ⟦⟧ mark what is learnt.

        Empty before the first step. Only `most` tokens are decoded: a sequence may have millions.
        """
        if self.sample is None:
            return ""
        sources = self._reader.mixture.sources
        has_chat = any(settings.chat is not None for settings in sources)
        tokens, labels = (tensor[:most] for tensor in self.sample)
        return sequence_text(tokens, labels, sources[0].tokenizer.tokenizer, has_chat)

    def names_data(self, stored: str | None) -> bool:
        """Tell whether a stored fingerprint is that of this loader's data; None is of any."""
        return names_data(stored, self.data_facts)

    def close(self) -> None:
        """End the worker processes."""
        self._reader.close()


def build_loader(
    training: Training,
    data: Data,
    seed: int,
    tokenizer: Tokenizer,
    plan: LanePlan,
    lane_states: Mapping[int, dict[str, Any]] | Mapping[str, dict[str, Any]] | None = None,
    stored_fingerprint: str | None = None,
    data_step: int = 0,
) -> Loader:
    """Return the loader of one rank, continuing from `lane_states` if given.

    `lane_states` must hold this rank's lanes; its keys may be strings, as JSON makes them.
    `data_step`: steps that the data have given before.
    `stored_fingerprint` is that of the data that they are of: a cursor has no meaning in other
    data.

    Raises ConfigError for what the config or the files do not allow, DataError for bad content.
    """
    mixture = build_mixture(training, data, seed, tokenizer, plan.num_lanes)
    logger.info("Data: %s", mixture.describe())
    amount = ""
    if logger.isEnabledFor(logging.INFO):  # describing opens files, for each rank that logs it
        every, sources = named_sources(training, data), [s.source for s in mixture.sources]
        for named, source in zip(every, sources):
            logger.info("Reads %s", describe_source(named, source))
        amount = describe_amount(every, sources)
    positions = {lane: mixture.start() for lane in plan.lanes}
    change = ""
    if lane_states is not None:
        states = {int(lane): state for lane, state in lane_states.items()}
        same = names_data(stored_fingerprint, data_facts(mixture))
        if not same:
            change = describe_change(mixture, states.values(), data.restart)
        if data.restart and not same:
            positions = dict.fromkeys(plan.lanes, restart(mixture, states.values()))
        else:
            positions = {lane: _position(mixture, lane, states) for lane in plan.lanes}
            if not same:
                positions = {lane: place.without_cursor() for lane, place in positions.items()}
    reader = LaneReader(mixture, positions, training)
    wanted = training.dataloader.num_workers
    if reader.num_workers < wanted:
        logger.info(
            "Reading with %d worker processes instead of %d: the number must divide this rank's"
            " %d data lanes",
            reader.num_workers,
            wanted,
            len(plan.lanes),
        )
    loader = Loader(reader, plan, positions, change, data_step, step_ranges(data.skip))
    loader.amount = amount
    return loader


def build_mixture(
    training: Training, data: Data, seed: int, tokenizer: Tokenizer, num_lanes: int
) -> Mixture:
    """Return the data of a run as all its lanes see them. Raises as `build_loader`."""
    named, documents = named_sources(training, data), document_tokenizer(tokenizer, data)
    return Mixture(
        sources=tuple(
            replace(_settings(source, seed, documents, num_lanes), number=number)
            for number, source in enumerate(named)
        ),
        names=tuple(source.name for source in named),
        weights=tuple(source.weight for source in named),
    )


def build_named(named: NamedSource, tokenizer: DocumentTokenizer) -> Source:
    """Return the source. Raises ConfigError that names the keys of its table."""
    try:
        source = build_source(named.training, named.data)
        problem = tokenizer_problem(source, tokenizer, named.training.dataset_path)
        if problem is not None and problem.severity == "error":
            raise ConfigError(problem)
    except ConfigError as error:
        raise ConfigError([named.under_own_key(problem) for problem in error.problems]) from None
    return source


def _settings(
    named: NamedSource, seed: int, tokenizer: DocumentTokenizer, num_lanes: int
) -> LaneSettings:
    source = build_named(named, tokenizer)
    settings = lane_settings(named, source, tokenizer, num_lanes, seed)
    if len(settings.shards) < num_lanes:
        problem = too_few_shards(len(settings.shards), num_lanes, named.data.lanes)
        raise ConfigError(named.under_own_key(problem))
    return settings


def lane_settings(
    named: NamedSource, source: Source, tokenizer: DocumentTokenizer, num_lanes: int, seed: int
) -> LaneSettings:
    """Return one dataset as all lanes see it."""
    data = named.data
    is_padded = data.format != "text" and not data.packing
    return LaneSettings(
        source=source,
        shards=source.shards(num_lanes),
        tokenizer=tokenizer,
        num_lanes=num_lanes,
        seq_len=named.training.seq_len,
        seed=seed,
        shuffle=data.shuffle,
        epochs=data.epochs,
        on_bad_row=data.on_bad_row,
        max_bad_rows=data.max_bad_rows,
        read_retries=data.read_retries,
        chat=chat_encoder(named.training, data, tokenizer.tokenizer),
        pad_to_multiple=data.pad_to_multiple if is_padded else None,
    )


def _position(mixture: Mixture, lane: int, states: dict[int, dict[str, Any]]) -> AnyPosition:
    try:
        return mixture.position(states[lane])
    except (KeyError, TypeError) as error:
        raise DataError(f"the stored state of data lane {lane} is not usable: {error!r}") from error
