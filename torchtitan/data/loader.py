"""The loader: the microbatches of a step, and where every lane stands after it.

A step takes `global_batch_size / num_lanes` consecutive samples of every lane. A data-parallel rank
serves a consecutive part of the lanes, so the samples of a step are the same for every degree that
divides the number of lanes. A checkpoint stores one small state a lane, whoever served it.
"""

import logging
from collections.abc import Mapping
from dataclasses import dataclass, field
from typing import Any

import torch

from torchtitan.config import ConfigError, DataError
from torchtitan.config.schema import Data, Training
from torchtitan.data.changed import describe_change, restart
from torchtitan.data.contents import with_digests
from torchtitan.data.document_ends import DocumentTokenizer, document_tokenizer
from torchtitan.data.identity import fingerprint_of, names_data, summary_of
from torchtitan.data.lanes import LaneSettings
from torchtitan.data.mixture import AnyPosition, Mixture
from torchtitan.data.named_sources import NamedSource, named_sources, require_sources
from torchtitan.data.packing import Sample, make_batch
from torchtitan.data.pieces import too_few_shards
from torchtitan.data.reading import describe_source
from torchtitan.data.registry import build_source
from torchtitan.data.sources import Source
from torchtitan.data.token_source import TokenSource, tokenizer_problem
from torchtitan.data.tokenizers import Tokenizer
from torchtitan.data.workers import LaneDataset, SampleStream, workers_for
from torchtitan.models.batch import Batch

logger = logging.getLogger(__name__)

_FORMAT = 1
"""Raised whenever the same files would give other samples."""


@dataclass(frozen=True)
class LanePlan:
    """Which lanes a data-parallel rank serves, and how much of them a step takes."""

    num_lanes: int
    dp_degree: int
    dp_rank: int
    global_batch_size: int
    local_batch_size: int

    def __post_init__(self) -> None:
        if self.global_batch_size % self.num_lanes or self.num_lanes % self.dp_degree:
            raise ValueError(
                f"{self.num_lanes} lanes must divide the global batch of"
                f" {self.global_batch_size} and be a multiple of the"
                f" data-parallel degree {self.dp_degree}"
            )
        if self.global_batch_size % (self.local_batch_size * self.dp_degree):
            raise ValueError(
                f"the global batch of {self.global_batch_size} is not a multiple of"
                f" {self.local_batch_size} sequences on {self.dp_degree} ranks"
            )

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
    """What a rank trains on in one step."""

    microbatches: list[Batch]
    lane_states: dict[int, dict[str, Any]]
    """Of this rank's lanes after the step; JSON, some 100 bytes each, times the sources."""
    ended: bool
    """All lanes of this rank had ended before the step: it holds padding only, no targets."""
    bad_rows: int
    """Rows that this rank's lanes have left out since the start of the run."""
    source_tokens: dict[str, int] = field(default_factory=dict)
    """Where sources are mixed: tokens of each since the start of the run, over all ranks."""


class Loader:
    """Made by `build_loader`. Not thread-safe."""

    def __init__(
        self,
        mixture: Mixture,
        plan: LanePlan,
        stream: SampleStream,
        positions: dict[int, AnyPosition],
        document_mask: bool,
        pin_memory: bool,
        change: str = "",
    ):
        self.change = change
        """What it means that the data are not those of the checkpoint; empty if they are."""
        self.data_facts = data_facts(mixture)
        """What a place in the data depends on."""
        self.fingerprint = fingerprint_of(self.data_facts)
        """Names the data and how they are cut: a resume with another one would go astray."""
        self.data_summary = summary_of(self.data_facts)
        """What the fingerprint is of, in short (JSON)."""
        self._mixture = mixture
        self._settings = mixture.sources[0]
        self._plan = plan
        self._stream = stream
        self._positions = positions
        self._document_mask = document_mask
        self._pin_memory = pin_memory
        self._pad_id = self._settings.tokenizer.pad_id

    def next_step(self) -> StepData:
        """The microbatches of the next step, each `[local_batch_size, seq_len]`.

        Raises DataError. Every rank of the same data-parallel rank must call it equally often.
        """
        plan = self._plan
        samples: list[Sample | None] = []
        for _ in range(plan.samples_per_lane):
            for lane in plan.lanes:
                item = next(self._stream)
                assert item.lane == lane
                samples.append(item.sample)
                self._positions[lane] = item.position
        batches = [
            self._batch(samples[start : start + plan.local_batch_size])
            for start in range(0, len(samples), plan.local_batch_size)
        ]
        states = {lane: position.state() for lane, position in self._positions.items()}
        bad_rows = sum(position.bad_rows for position in self._positions.values())
        if bad_rows > self._settings.max_bad_rows:
            raise DataError(
                f"left out {bad_rows} rows that cannot be read, more than"
                f" data.max_bad_rows = {self._settings.max_bad_rows}"
            )
        ended = all(sample is None for sample in samples)
        source_tokens = self._mixture.source_tokens(self._positions[plan.lanes[0]])
        return StepData(batches, states, ended, bad_rows, source_tokens)

    def names_data(self, stored: str | None) -> bool:
        """Tell whether a stored fingerprint is that of this loader's data; None is of any."""
        return names_data(stored, self.data_facts)

    def close(self) -> None:
        """End the reading processes."""
        self._stream.close()

    def _batch(self, samples: list[Sample | None]) -> Batch:
        seq_len = self._settings.seq_len
        batch = make_batch(samples, seq_len, self._document_mask, self._pad_id)
        return batch.pin_memory() if self._pin_memory else batch


def build_loader(
    training: Training,
    data: Data,
    seed: int,
    tokenizer: Tokenizer,
    plan: LanePlan,
    lane_states: Mapping[int, dict[str, Any]] | Mapping[str, dict[str, Any]] | None = None,
    stored_fingerprint: str | None = None,
) -> Loader:
    """The loader of one rank, continuing from `lane_states` (of all lanes, or at least its own).

    Their keys may be strings, as JSON makes them. `stored_fingerprint` is that of the data that
    they are of: in other data a source's cursor has no meaning.

    Raises ConfigError for what the config or the files do not allow, DataError for bad content.
    """
    logger.info("%s", document_tokenizer(tokenizer, data).describe())
    mixture = build_mixture(training, data, seed, tokenizer, plan.num_lanes)
    for named, settings in zip(named_sources(training, data), mixture.sources):
        logger.info("Reads %s", describe_source(named, settings.source))
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
    options = training.dataloader
    num_workers = workers_for(len(plan.lanes), options.num_workers)
    if num_workers < options.num_workers:
        logger.info(
            "Reading with %d worker processes instead of %d: the number must divide this rank's"
            " %d data lanes",
            num_workers,
            options.num_workers,
            len(plan.lanes),
        )
    dataset = LaneDataset(mixture, dict(positions))
    stream = SampleStream(dataset, num_workers, options.prefetch_factor)
    pin_memory = options.pin_memory and torch.cuda.is_available()
    return Loader(mixture, plan, stream, positions, training.document_mask, pin_memory, change)


def build_mixture(
    training: Training, data: Data, seed: int, tokenizer: Tokenizer, num_lanes: int
) -> Mixture:
    """The data of a run as all its lanes see them. Raises as `build_loader`."""
    named = require_sources(training, data)
    documents = document_tokenizer(tokenizer, data)
    return Mixture(
        sources=tuple(_settings(source, seed, documents, num_lanes) for source in named),
        names=tuple(source.name for source in named),
        weights=tuple(source.weight for source in named),
    )


def build_named(named: NamedSource, tokenizer: DocumentTokenizer) -> Source:
    """The source. Raises ConfigError by the keys that name it."""
    try:
        source = build_source(named.training, named.data)
        problem = tokenizer_problem(source, tokenizer, named.training.dataset_path)
        if problem is not None and problem.severity == "error":
            raise ConfigError(problem)
    except ConfigError as error:
        raise ConfigError([named.retold(problem) for problem in error.problems]) from None
    return source


def _settings(
    named: NamedSource, seed: int, tokenizer: DocumentTokenizer, num_lanes: int
) -> LaneSettings:
    """One source as all lanes see it. Raises ConfigError by the keys that name it."""
    training, data = named.training, named.data
    source = build_named(named, tokenizer)
    shards = source.shards(num_lanes)
    if len(shards) < num_lanes:
        raise ConfigError(named.retold(too_few_shards(len(shards), num_lanes, data.lanes)))
    return LaneSettings(
        source=source,
        shards=shards,
        tokenizer=tokenizer,
        num_lanes=num_lanes,
        seq_len=training.seq_len,
        seed=seed,
        shuffle=data.shuffle,
        epochs=data.epochs,
        on_bad_row=data.on_bad_row,
        max_bad_rows=data.max_bad_rows,
    )


def _position(mixture: Mixture, lane: int, states: dict[int, dict[str, Any]]) -> AnyPosition:
    try:
        return mixture.position(states[lane])
    except (KeyError, TypeError) as error:
        raise DataError(f"the stored state of data lane {lane} is not usable: {error!r}") from error


def data_facts(mixture: Mixture) -> dict[str, Any]:
    """Everything that a place in the data depends on, as JSON. Raises DataError."""
    settings = mixture.sources[0]
    tokenizer = settings.tokenizer
    # The ends of documents that are tokens already are in the tokens.
    are_tokens = all(isinstance(of.source, TokenSource) for of in mixture.sources)
    return {
        "format": _FORMAT,
        "data": mixture.description(with_digests),
        "tokenizer": (tokenizer.tokenizer if are_tokens else tokenizer).fingerprint,
        "num_lanes": settings.num_lanes,
        "seq_len": settings.seq_len,
        "seed": settings.seed,
        "shuffle": settings.shuffle,
    }
