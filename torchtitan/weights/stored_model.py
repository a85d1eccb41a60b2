"""A model on disk, of which any tensor can be read: what is exported and converted."""

import logging
import math
import time
from collections.abc import Callable, Iterable, Iterator, Mapping, Sequence
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any, Protocol

import torch
from torch import Tensor
from torch.distributed.checkpoint.api import CheckpointException

from torchtitan.models.decoder.args import DecoderArgs
from torchtitan.models.family import ModelFamily
from torchtitan.weights.recognise import InvalidWeights

logger = logging.getLogger(__name__)

DtypeOf = Callable[[str], torch.dtype]
"""Returns the type in which the tensor of a name is written."""

_BATCH_BYTES = 64 * 2**20
_SECONDS_BETWEEN_LINES = 10.0


class Weights(Protocol):
    """Named tensors that can be read: a `WeightSource`, a step, or a file of `torch.save`."""

    @property
    def tensors(self) -> Mapping[str, dict[str, Any]]:
        """Type and shape by our name, as in `Manifest.tensors`."""

    def load(self, tensors: Mapping[str, Tensor]) -> None:
        """Fill whole tensors of these names in place, converting types that differ."""


@dataclass(frozen=True)
class StoredModel:
    """A model's hyper-parameters and weights.

    `tokenizer_path` is its tokenizer, as `model.tokenizer_path` names one, if it has one;
    `training` is what the run that made it has recorded: `step`, `state`, `config` and `versions`.
    """

    path: Path
    family: ModelFamily
    args: DecoderArgs
    weights: Weights
    tokenizer_path: str | None = None
    training: Mapping[str, Any] = field(default_factory=dict)
    reference: Callable[[Tensor], Tensor] | None = None
    """Returns the logits `[B, T, V]` of tokens `[B, T]` that the weights stand for, rounded to
    their types; None: those of the weights themselves."""


def target_dtype(entry: Mapping[str, Any], dtype: str | None) -> torch.dtype:
    """Return the type in which a tensor described by `entry` is written; None keeps its own."""
    own: torch.dtype = getattr(torch, entry["dtype"])
    return own if dtype is None or not own.is_floating_point else getattr(torch, dtype)


def read_tensors(
    weights: Weights, names: Iterable[str], dtype: str | DtypeOf | None = None
) -> Iterator[tuple[str, Tensor]]:
    """Yield tensors whole, in order, converted to `dtype`, which may be a function of the name.

    Holds no more than the largest tensor, or 64 MiB, and what the caller keeps. Raises
    `InvalidWeights` if the files are damaged, and for a value that `dtype` cannot hold.
    """
    names, tensors = list(names), weights.tensors
    printed, done = time.monotonic(), 0
    for batch in _batches(names, tensors):
        if time.monotonic() - printed > _SECONDS_BETWEEN_LINES:
            printed = time.monotonic()
            logger.info("%d of %d tensors", done, len(names))
        done += len(batch)
        held = {name: empty(tensors[name]) for name in batch}
        load(weights, held)
        for name in batch:
            target = dtype(name) if callable(dtype) else target_dtype(tensors[name], dtype)
            yield name, convert(name, held.pop(name), target)


def load(weights: Weights, tensors: Mapping[str, Tensor]) -> None:
    """Call `weights.load`, with `InvalidWeights` for whatever a damaged file raises."""
    try:
        weights.load(tensors)
    except InvalidWeights:
        raise
    except (Exception, CheckpointException) as error:  # torch does not document what it raises
        names = next(iter(tensors))
        raise InvalidWeights(f"{names} could not be read: {error}") from error


def convert(name: str, tensor: Tensor, dtype: torch.dtype) -> Tensor:
    """Return the tensor in another type.

    Raises `InvalidWeights` for values that are not finite, or beyond the range of `dtype`.
    """
    converted = tensor.to(dtype)
    if not converted.is_floating_point() or not converted.numel():
        return converted
    if not _is_finite(converted):
        if not _is_finite(tensor):
            raise InvalidWeights(f"{name} has values that are not finite numbers")
        kind = str(dtype).removeprefix("torch.")
        largest = max(abs(bound.item()) for bound in tensor.aminmax())
        raise InvalidWeights(f"{name} has a value of {largest:.6g}, which is too large for {kind}")
    return converted


def _is_finite(tensor: Tensor) -> bool:
    """Return whether all values are finite, without a second tensor of this size."""
    return all(math.isfinite(bound.item()) for bound in tensor.aminmax())


def _batches(names: Sequence[str], tensors: Mapping[str, dict[str, Any]]) -> Iterator[list[str]]:
    """Yield names in order, together at most as large as `read_tensors` says."""
    sizes = {name: empty(tensors[name], "meta").nbytes for name in names}
    most = max([_BATCH_BYTES, *sizes.values()])
    batch: list[str] = []
    size = 0
    for name in names:
        if batch and size + sizes[name] > most:
            yield batch
            batch, size = [], 0
        batch.append(name)
        size += sizes[name]
    if batch:
        yield batch


def empty(entry: Mapping[str, Any], device: str = "cpu") -> Tensor:
    """Return memory for a tensor that `Weights.tensors` describes."""
    return torch.empty(entry["shape"], dtype=getattr(torch, entry["dtype"]), device=device)
