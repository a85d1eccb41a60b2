"""A recorded step: what the ranks of a side have written, by name and place."""

import json
import math
from collections.abc import Iterator, Mapping
from contextlib import ExitStack
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import numpy as np
import torch
from safetensors import safe_open

from torchtitan.training.tensor_recorder import PHASES, TOKEN_BITS

PHASES_OF_ACTIVATIONS = ("batch", "forward", "backward")
"""Their tensors have a value for each token."""

Name = tuple[str, str]
"""Phase, and module or tensor."""


@dataclass(frozen=True)
class Piece:
    """A part of a tensor: its values, and the indices along each dimension."""

    ranks: tuple[int, ...]
    """The rank that has it, or those that have terms of a sum."""
    indices: tuple[np.ndarray, ...]
    values: np.ndarray


class RecordedTensors:
    """The files that the ranks of one side have written."""

    def __init__(self, folder: Path):
        """Read the lists of tensors. Raises OSError or ValueError for other folders."""
        self._stack = ExitStack()
        self._folder = folder
        self._files: dict[str, Any] = {}
        self.entries: dict[Name, list[tuple[int, dict[str, Any]]]] = {}
        self.places: dict[int, dict[str, int]] = {}
        self.degrees: dict[str, int] = {}
        meshes = []
        for path in folder.glob("*.json"):
            about = json.loads(path.read_text())
            rank, self.degrees = about["rank"], about["degrees"]
            meshes.append(self.degrees)
            self.places[rank] = about["place"]
            for entry in about["entries"]:
                self.entries.setdefault((entry["phase"], entry["name"]), []).append((rank, entry))
        if not meshes:
            raise ValueError(f"{folder} holds no recorded step")
        ranks = math.prod(self.degrees.values())
        if any(mesh != self.degrees for mesh in meshes):
            raise ValueError(f"{folder} holds steps of several meshes")
        if len(self.places) != ranks:
            raise ValueError(f"{folder} holds {len(self.places)} of {ranks} ranks")
        for uses in self.entries.values():
            uses.sort(key=lambda use: (use[0], int(use[1]["key"])))

    def close(self) -> None:
        """Close the files."""
        self._stack.close()

    def names(self) -> list[Name]:
        """Return the names in the order of the step."""
        first: dict[Name, tuple[int, int, int]] = {}
        for name, uses in self.entries.items():
            phase = PHASES.index(name[0])
            sign = -1 if name[0] in ("backward", "gradients") else 1
            first[name] = min((phase, sign * e["stage"], int(e["key"])) for _, e in uses)
        return sorted(first, key=lambda name: first[name])

    def feature_sizes(self, name: Name) -> set[int]:
        """Return how many features an activation may have, as far as its shape says."""
        _, entry = self.entries[name][0]
        size = self._shape(entry)[-1]
        return {size * parts for parts in _divisors(entry["shares"])}

    def is_activation(self, name: Name) -> bool:
        """Return whether a tensor has a value for each token."""
        return name[0] in PHASES_OF_ACTIVATIONS

    def num_tokens(self, name: Name) -> int:
        """Return the length of the sequences of an activation."""
        places = (self._get(entry, "/0") for _, entry in self.entries[name])
        return 1 + max(int((place & ((1 << TOKEN_BITS) - 1)).max()) for place in places)

    def pieces(self, name: Name, num_features: int, num_tokens: int) -> Iterator[Piece]:
        """Yield what the ranks hold of a tensor; an activation is `[sequence and token, F]`."""
        for rank, entry in self.entries[name]:
            values = self._get(entry).double().numpy()
            if not self.is_activation(name):
                held = [self._get(entry, f"/{n}").numpy() for n in range(entry["places"])]
                yield Piece((rank,), tuple(held), values)
                continue
            place = self._get(entry, "/0").flatten().numpy()
            rows = (place >> TOKEN_BITS) * num_tokens + (place & ((1 << TOKEN_BITS) - 1))
            values = values.reshape(len(rows), -1)
            size = values.shape[1]
            part = self.places[rank]["tp"] * (num_features // size) // self.degrees["tp"]
            columns = np.arange(part * size, (part + 1) * size)
            yield Piece((rank,), (rows, columns), values)

    def _shape(self, entry: Mapping[str, Any]) -> list[int]:
        return self._file(entry).get_slice(entry["key"]).get_shape()

    def _get(self, entry: Mapping[str, Any], part: str = "") -> torch.Tensor:
        return self._file(entry).get_tensor(entry["key"] + part)

    def _file(self, entry: Mapping[str, Any]) -> Any:
        name = entry["file"]
        if name not in self._files:
            opened = safe_open(self._folder / name, "pt")
            self._files[name] = self._stack.enter_context(opened)
        return self._files[name]


def _divisors(number: int) -> list[int]:
    return [n for n in range(1, number + 1) if number % n == 0]
