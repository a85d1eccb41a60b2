"""Collective calls with one outcome: all ranks get the result, or the error of one of them."""

from collections.abc import Callable, Mapping
from pathlib import Path
from typing import Any, TypeVar

import torch
import torch.distributed.checkpoint as dcp
from torch.distributed.checkpoint.api import CheckpointException

from torchtitan.checkpoint.dcp_io import SafeReader, describe_tensor
from torchtitan.checkpoint.manifest import InvalidCheckpoint
from torchtitan.config import CheckpointError
from torchtitan.distributed.context import DistributedContext
from torchtitan.utils.processes import StopRequested
from torchtitan.weights.recognise import InvalidWeights

T = TypeVar("T")
# CheckpointException is a BaseException, which `except Exception` lets pass.
_FAILURES = (Exception, CheckpointException)
_STOPPED = f": {StopRequested.__name__}"
"""At the end of the line on a rank that was asked to stop: DCP makes an exception of it, too."""


def run_on_rank0(world: DistributedContext, what: str, action: Callable[[], T]) -> T:
    """Run `action` on rank 0; its JSON result reaches all ranks, or its error as `CheckpointError`.

    `what` opens the message of an error. All ranks must call it.
    """
    answer: dict[str, Any] = {}
    if world.is_main:
        try:
            answer = {"value": action()}
        except _FAILURES as failure:
            answer = {"error": _describe(failure, 0)}
    answer = world.broadcast_json(answer)
    if "error" in answer:
        raise CheckpointError(f"{what}: {answer['error']}")
    value: T = answer["value"]
    return value


def run_on_all_ranks(world: DistributedContext, what: str, action: Callable[[], T]) -> T:
    """Run `action` on every rank; an error on one becomes `CheckpointError` on all.

    Raises StopRequested on all ranks if a signal has interrupted it on one.
    """
    error, cause = "", None
    results: list[T] = []
    try:
        results.append(action())
    except _FAILURES as failure:
        error, cause = _describe(failure, world.rank), failure
    errors = [text for text in world.gather_json(error) if text]
    if any(text.endswith(_STOPPED) for text in errors):
        raise StopRequested
    if errors:
        raise CheckpointError(f"{what}: {errors[0]}") from cause
    return results[0]


def describe_on_all_ranks(
    world: DistributedContext, tensors: Mapping[str, torch.Tensor]
) -> list[dict[str, dict[str, Any]]]:
    """Return the types and shapes of all ranks' tensors; one entry for ranks with the same."""
    return world.gather_distinct_json(
        {name: describe_tensor(tensor) for name, tensor in tensors.items()}
    )


def read_tensors(
    world: DistributedContext, path: Path, tensors: Mapping[str, torch.Tensor]
) -> None:
    """Fill `tensors` in place from the verified checkpoint in `path`; all ranks call it."""

    def read() -> None:
        reader, group = SafeReader(path), world.control_group
        dcp.load(dict(tensors), storage_reader=reader, process_group=group)

    run_on_all_ranks(world, f"{path} could not be loaded", read)


def _describe(failure: BaseException, rank: int) -> str:
    """Return one line that names the failing rank; DCP's exception holds those of all ranks."""
    failures = getattr(failure, "failures", None)
    if isinstance(failures, dict) and failures:
        rank, wrapped = sorted(failures.items())[0]
        failure = wrapped[0] if isinstance(wrapped, tuple) else wrapped
    text = str(failure).strip()
    told = isinstance(failure, InvalidCheckpoint | InvalidWeights | OSError)
    kind = "" if told else type(failure).__name__
    return f"rank {rank}: {kind}{': ' if kind and text else ''}{text}"
