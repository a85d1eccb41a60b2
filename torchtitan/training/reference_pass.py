"""The reference's log-probabilities, computed once in a pass over the data, and kept in files.

Each set of data has a file of its own, named by a fingerprint of everything that the values depend
on: another reference, other data or another template have another file. So a file is never stale,
several runs share a folder, and a new validation set is all that is computed anew.
"""

import gc
import hashlib
import json
import logging
import time
from collections.abc import Callable, Iterable, Iterator, Sequence
from contextlib import closing
from dataclasses import dataclass, replace
from functools import partial
from pathlib import Path
from typing import Any

import torch

from torchtitan.checkpoint.collective import run_on_rank0
from torchtitan.config import JobConfig
from torchtitan.config.run_context import RunContext
from torchtitan.data.identity import with_digests
from torchtitan.data.named_sources import NamedSource, named_sources
from torchtitan.data.tokenizers import Tokenizer
from torchtitan.data.validation_reader import Pass, SetReader, build_reader
from torchtitan.distributed.context import DistributedContext
from torchtitan.distributed.parallel_dims import ParallelDims
from torchtitan.loss.reference_cache import CachedLogProbs
from torchtitan.models.batch import Batch
from torchtitan.parallel.runner import Loss
from torchtitan.training import builder
from torchtitan.training.model_builder import BuiltModel
from torchtitan.training.prefetch import Prefetch
from torchtitan.training.validation import SECONDS_BETWEEN_LINES, batches_of
from torchtitan.utils.processes import StopRequest, StopRequested
from torchtitan.utils.torch_compat import all_gather_single

logger = logging.getLogger(__name__)

_FORMAT = 1
"""Increased whenever the same facts would give other values."""

Annotate = Callable[[Sequence[Batch]], Sequence[Batch]]
"""Evaluates the reference and returns the batches with what was recorded. Collective."""


@dataclass(frozen=True)
class PairSet:
    """A set of pairs, each of which it gives once."""

    name: str
    facts: Any
    """Identifies its pairs (JSON)."""
    batches: Callable[[], Iterable[Sequence[Batch]]]
    """Reads this rank's share, in equally many rounds on all ranks."""


def cached_log_probs(
    sets: Sequence[PairSet],
    facts: Any,
    folder: Path,
    build_reference: Callable[[], Annotate],
    world: DistributedContext,
) -> CachedLogProbs:
    """Return the log-probabilities of all sets, from `folder` or by a pass over the data.

    `facts` identify the reference (JSON). It is built only if a file is missing, and freed
    again. All ranks must call it. Raises DataError, CheckpointError.
    """
    found = []
    annotate: Annotate | None = None
    for data in sets:
        text = json.dumps([_FORMAT, facts, data.facts], sort_keys=True)
        name = f"{hashlib.sha256(text.encode()).hexdigest()[:32]}.safetensors"
        path = folder / world.broadcast_json(name)
        known = CachedLogProbs.read(path)
        if not all(world.gather_json(known is not None)):
            logger.info(
                "Computes the reference's log-probabilities of %s once: %s has none of this"
                " reference and these data",
                data.name,
                folder,
            )
            annotate = annotate or build_reference()
            known = _compute(data, annotate, world)
            run_on_rank0(world, f"{path} cannot be written", partial(known.write, path))
        assert known is not None
        found.append(known)
    if annotate is not None:
        del annotate
        gc.collect()  # modules refer to each other
        if world.device.type == "cuda":
            torch.cuda.empty_cache()
    return CachedLogProbs.merged(found)


def _compute(data: PairSet, annotate: Annotate, world: DistributedContext) -> CachedLogProbs:
    """Return the log-probabilities of the whole set, on all ranks."""
    parts = [CachedLogProbs.of([])]  # all pairs of a set may be too long
    num_rows, logged = 0, time.monotonic()
    for batches in data.batches():
        parts.append(CachedLogProbs.of(annotate(batches)))
        num_rows += sum(len(batch["tokens"]) for batch in batches)
        if time.monotonic() - logged > SECONDS_BETWEEN_LINES:
            logged = time.monotonic()
            logger.info("Read %s sequences of %s on this rank", f"{num_rows:,}", data.name)
    return _of_all_ranks(CachedLogProbs.merged(parts), world)


def _named(config: JobConfig) -> list[NamedSource]:
    """Return the training data; one dataset alone, which has no name, with one for the log."""
    return [
        of if of.place else replace(of, name="training data")
        for of in named_sources(config.training, config.data)
    ]


def _of_all_ranks(own: CachedLogProbs, world: DistributedContext) -> CachedLogProbs:
    """Return what all ranks have, several of them the same."""
    tensors = own.tensors
    sizes = world.gather_json(len(tensors["keys"]))
    parts: list[dict[str, torch.Tensor]] = [{} for _ in sizes]
    for name, dtype in (("keys", torch.int64), ("log_probs", torch.float64)):
        padded = torch.zeros(max(sizes), dtype=dtype)
        padded[: len(tensors[name])] = tensors[name]
        gathered = torch.zeros(len(sizes) * max(sizes), dtype=dtype)
        all_gather_single(gathered, padded, world.control_group)
        for part, size, row in zip(parts, sizes, gathered.view(len(sizes), -1)):
            part[name] = row[:size]
    return CachedLogProbs.merged([CachedLogProbs(**part) for part in parts])


def sets_of_run(
    context: RunContext,
    dims: ParallelDims,
    world: DistributedContext,
    tokenizer: Tokenizer,
    loss: Loss,
    stop: StopRequest,
) -> list[PairSet]:
    """Return all pairs that a run reads: each source of its data, and its validation sets.

    Reading them raises StopRequested on all ranks if `stop` asks one of them to.
    """
    config = context.config
    readers = [
        build_reader(
            named,
            tokenizer,
            num_lanes=context.num_lanes,
            max_sequences=None,
            dp_degree=dims.dp,
            dp_rank=dims.dp_rank(world.rank),
        )
        for named in _named(config)
    ]
    readers += builder.build_validation_readers(context, dims, world, tokenizer)
    is_data_leader = dims.is_data_leader(world.rank)

    def fetch_ahead(steps: Pass) -> Prefetch:
        return Prefetch(steps, loss, world, stop, is_data_leader)

    def batches(reader: SetReader) -> Iterator[Sequence[Batch]]:
        with closing(batches_of(reader, fetch_ahead)) as found:
            for data, agreed in found:
                if agreed.stop:
                    raise StopRequested
                yield data.microbatches

    # Larger rows are left out.
    limit = {"largest": config.data.max_document_mib}
    return [PairSet(of.name, _facts_of(of) | limit, partial(batches, of)) for of in readers]


def _facts_of(reader: SetReader) -> dict[str, Any]:
    """Return what the pairs of a set depend on; the order does not matter if all are read."""
    settings, most = reader.mixture.sources[0], reader.max_sequences
    return {
        "data": settings.description(with_digests),
        "tokenizer": settings.tokenizer.fingerprint,
        "seq_len": settings.seq_len,
        "part": None if most is None else [most, reader.num_lanes],
    }


def reference_facts(config: JobConfig, model: BuiltModel, weights: Any) -> Any:
    """Return what log-probabilities of a reference depend on; `weights` identify its weights."""
    handlers, training = config.model.handlers, config.training
    return {
        "weights": [weights, config.checkpoint.exclude_from_loading],
        "model": [config.model.name, config.model.norm_type, repr(model.args)],
        "handlers": [[name, config.handlers.get(name, {})] for name in handlers],
        "seed": config.debug.seed if handlers else None,  # of parameters that they add
        "dtype": [training.dtype, training.mixed_precision_param],
    }
