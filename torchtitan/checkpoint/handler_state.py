"""State that model handlers keep from step to step, such as an average of the weights.

Tensors are stored like the model's, by name, and resharded on load; other values are in the
manifest, once for all ranks. A handler gets them back after `after_load`, when it has created the
tensors to load into.
"""

import hashlib
import json
import logging
from collections.abc import Mapping, Sequence
from pathlib import Path
from typing import Any, Protocol

import torch
from torch.distributed.tensor import DTensor

from torchtitan.checkpoint.collective import describe_on_all_ranks, read_tensors
from torchtitan.checkpoint.manifest import (
    HANDLER_PREFIX,
    HANDLERS_STATE,
    Manifest,
    select_tensors,
    tensor_differences,
)
from torchtitan.checkpoint.state import plain_tensor
from torchtitan.config import CheckpointError
from torchtitan.distributed.context import DistributedContext

logger = logging.getLogger(__name__)


class KeepsState(Protocol):
    """The part of a model handler that concerns its state."""

    name: str

    def state_dict(self) -> dict[str, Any] | None:
        """Return live tensors and plain values by name; None if it keeps no state."""

    def load_state_dict(self, state: dict[str, Any]) -> None:
        """Restore what `state_dict` returned when the checkpoint was written."""


class HandlerState:
    """The current state of the handlers on this rank."""

    def __init__(self, handlers: Sequence[KeepsState]):
        self.kept: dict[str, dict[str, Any]] = {}
        """The `state_dict` of each handler by name."""
        for handler in handlers:
            state = handler.state_dict()
            if state is not None:
                self.kept[handler.name] = state

    def tensors(self, handlers: Sequence[str] | None = None) -> dict[str, torch.Tensor]:
        """Return the live tensors by their names in a checkpoint, of all handlers by default."""
        return {
            f"{HANDLER_PREFIX}{handler}.{key}": plain_tensor(value.detach())
            for handler in (self.kept if handlers is None else handlers)
            for key, value in self.kept[handler].items()
            if isinstance(value, torch.Tensor)
        }

    def values(self) -> dict[str, dict[str, Any]]:
        """Return values that are not tensors; TypeError for a value that JSON would change."""
        return {
            handler: {
                key: _require_plain(handler, key, value)
                for key, value in state.items()
                if not isinstance(value, torch.Tensor)
            }
            for handler, state in self.kept.items()
        }

    def agreed_values(self, world: DistributedContext) -> dict[str, dict[str, Any]]:
        """Return the values of all ranks together. All ranks must call it.

        Raises `CheckpointError` on all ranks if they keep different values, or different plain
        tensors, under one name: only one of them would be stored.
        """
        copies = {
            name: _digest(tensor)
            for name, tensor in self.tensors().items()
            if not isinstance(tensor, DTensor)
        }
        merged: dict[str, dict[str, Any]] = {}
        digests: dict[str, str] = {}
        for part in world.gather_distinct_json({"values": self.values(), "copies": copies}):
            for handler, values in part["values"].items():
                _merge(merged.setdefault(handler, {}), values, f"{HANDLER_PREFIX}{handler}.")
            _merge(digests, part["copies"], "")
        return merged


def load_handler_state(
    world: DistributedContext, path: Path, manifest: Manifest, handlers: Sequence[KeepsState]
) -> None:
    """Restore the handlers' state from the verified checkpoint in `path`.

    All ranks must call it, after the handlers' `after_load`. Warns of a handler without stored
    state, and of stored state without a handler. Raises `CheckpointError`, before any tensor was
    written, if tensors differ in name, shape or type.
    """
    state = HandlerState(handlers)
    values: Mapping[str, dict[str, Any]] = manifest.state.get(HANDLERS_STATE, {})
    for name in state.kept:
        if name not in values:
            logger.warning("The handler %s starts without state: %s holds none of it.", name, path)
    for name in values:
        if name not in state.kept:
            text = "%s holds state of the handler %s, which this run lacks: later steps drop it."
            logger.warning(text, path, name)
    found = [name for name in state.kept if name in values]
    if not found:
        return
    wanted = state.tensors(found)
    stored = {
        name: entry
        for name, entry in select_tensors(manifest, of_handlers=True).tensors.items()
        if name.removeprefix(HANDLER_PREFIX).partition(".")[0] in found
    }
    differences = tensor_differences(stored, describe_on_all_ranks(world, wanted))
    if differences:
        raise CheckpointError(f"{path} does not fit the handlers: {differences}")
    if stored:
        read_tensors(world, path, wanted)
    for handler in handlers:
        if handler.name in found:
            kept = state.kept[handler.name].items()
            tensors = {key: value for key, value in kept if isinstance(value, torch.Tensor)}
            handler.load_state_dict(tensors | values[handler.name])


def _require_plain(handler: str, key: str, value: Any) -> Any:
    """Return `value` if JSON keeps it; a tuple, for example, would become a list."""
    try:
        kept = json.loads(json.dumps(value))
    except (TypeError, ValueError):
        kept = None
    if repr(kept) != repr(value):
        raise TypeError(
            f"the handler {handler} keeps {key} as {value!r}: state must consist of tensors, or of"
            " numbers, text, lists and dicts with text as keys"
        )
    return value


def _merge(whole: dict[str, Any], part: Mapping[str, Any], prefix: str) -> None:
    for key, value in part.items():
        if key in whole and repr(whole[key]) != repr(value):
            raise CheckpointError(
                f"the ranks keep different values of {prefix}{key}, and a checkpoint holds one."
                " Fix: make it a DTensor, exchange it so that all ranks have the same, or name it"
                " after the part of the model that it belongs to"
            )
        whole[key] = value


def _digest(tensor: torch.Tensor) -> str:
    flat = tensor.detach().cpu().contiguous().flatten().view(torch.uint8)
    return hashlib.sha256(flat.numpy().tobytes()).hexdigest()
