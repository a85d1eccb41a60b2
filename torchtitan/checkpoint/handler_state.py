"""State that model handlers keep from step to step, such as an average of the weights.

Tensors are stored like the model's, by name and resharded at a load; other values lie in the
manifest, once for all ranks. A handler is given them back after `after_load`, when it has made what
they are loaded into.
"""

import hashlib
import json
import logging
from collections.abc import Mapping, Sequence
from pathlib import Path
from typing import Any, Protocol

import torch
import torch.distributed.checkpoint as dcp
from torch.distributed.tensor import DTensor

from torchtitan.checkpoint.agreement import on_all
from torchtitan.checkpoint.commit import describe_on_all_ranks
from torchtitan.checkpoint.dcp_io import SafeReader
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
    """A model handler, as far as its state is concerned."""

    name: str

    def state_dict(self) -> dict[str, Any] | None:
        """Return live tensors and plain values by name; None if it keeps no state."""

    def load_state_dict(self, state: dict[str, Any]) -> None:
        """Take over what `state_dict` returned when the checkpoint was written."""


class HandlerState:
    """What the handlers of this rank keep now."""

    def __init__(self, handlers: Sequence[KeepsState]):
        self.kept: dict[str, dict[str, Any]] = {}
        """By handler, what its `state_dict` returned."""
        for handler in handlers:
            state = handler.state_dict()
            if state is not None:
                self.kept[handler.name] = state

    def tensors(self, handlers: Sequence[str] | None = None) -> dict[str, torch.Tensor]:
        """Return the live tensors by their names in a checkpoint; of all handlers by default."""
        return {
            f"{HANDLER_PREFIX}{handler}.{key}": plain_tensor(value.detach())
            for handler in (self.kept if handlers is None else handlers)
            for key, value in self.kept[handler].items()
            if isinstance(value, torch.Tensor)
        }

    def values(self) -> dict[str, dict[str, Any]]:
        """Return what is no tensor, by handler. Raises TypeError for what JSON would change."""
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

        Raises `CheckpointError`, on all ranks, if ranks keep different values under one name, or
        different tensors that are no DTensors: only one of them would be stored.
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
    """Give handlers what the checkpoint in `path`, which is verified, holds of them. All ranks must
    call it, after the handlers' `after_load`.

    Warns of a handler that keeps state and finds none, and of state that no handler takes. Raises
    `CheckpointError`, before any tensor was written, when tensors differ in name, shape or type.
    """
    state = HandlerState(handlers)
    values: Mapping[str, dict[str, Any]] = manifest.state.get(HANDLERS_STATE, {})
    for name in state.kept:
        if name not in values:
            logger.warning("The handler %s begins anew: %s holds no state of it.", name, path)
    for name in values:
        if name not in state.kept:
            text = "%s holds state of the handler %s, which nothing takes: later steps lack it."
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

    def read() -> None:
        group = world.control_group
        dcp.load(dict(wanted), storage_reader=SafeReader(path), process_group=group)

    if stored:
        on_all(world, f"{path} could not be loaded", read)
    for handler in handlers:
        if handler.name in found:
            kept = state.kept[handler.name].items()
            tensors = {key: value for key, value in kept if isinstance(value, torch.Tensor)}
            handler.load_state_dict(tensors | values[handler.name])


def _require_plain(handler: str, key: str, value: Any) -> Any:
    """Through JSON a tuple becomes a list, and a number that is a key becomes text."""
    try:
        kept = json.loads(json.dumps(value))
    except (TypeError, ValueError):
        kept = None
    if repr(kept) != repr(value):
        raise TypeError(
            f"the handler {handler} keeps {key} as {value!r}: state has to be tensors, and numbers,"
            " text, lists and dicts (with text as keys) of these"
        )
    return value


def _merge(whole: dict[str, Any], part: Mapping[str, Any], prefix: str) -> None:
    for key, value in part.items():
        if key in whole and repr(whole[key]) != repr(value):
            raise CheckpointError(
                f"the ranks keep different values of {prefix}{key}, and a checkpoint holds one."
                " Fix: make it a DTensor, exchange it so that all ranks have the same, or give what"
                " belongs to a part of the model the name of that part"
            )
        whole[key] = value


def _digest(tensor: torch.Tensor) -> str:
    flat = tensor.detach().cpu().contiguous().flatten().view(torch.uint8)
    return hashlib.sha256(flat.numpy().tobytes()).hexdigest()
