"""Read Meta's `consolidated.*.pth`: the whole model, or its model-parallel parts."""

import re
from collections.abc import Iterator
from contextlib import contextmanager
from pathlib import Path
from typing import Any

import torch
from torch import Tensor

from torchtitan.models.decoder.args import DecoderArgs
from torchtitan.models.family import ModelFamily
from torchtitan.weights.recognise import InvalidWeights
from torchtitan.weights.source import (
    GetSlice,
    Part,
    StoredTensor,
    WeightSource,
    require_float,
    require_known,
)

_FILE = re.compile(r"consolidated\.(\d\d)\.pth")
_DERIVED = ("rope.freqs",)


class MetaSource(WeightSource):
    """The weights of Meta's files, which have our names and order. Raises `InvalidWeights`.

    Which dimension the parts share out follows from their shapes and those of the model.
    """

    kind = "meta"

    def __init__(
        self, path: Path, family: ModelFamily, args: DecoderArgs, pads_vocabulary: bool = False
    ):
        with torch.device("meta"):
            wanted = {name: tuple(t.shape) for name, t in family.build(args).state_dict().items()}
        files = _files(path)
        parts = [(file, _read_headers(file)) for file in files]
        names = parts[0][1].keys()
        for _, held in parts[1:]:
            if held.keys() != names:
                name = sorted(held.keys() ^ names)[0]
                raise InvalidWeights(f"{path}: {name} is not in all of {len(files)} parts")
        require_known(path, [name for name in names if name not in wanted])
        stored = {
            name: _join(name, [(file, held[name]) for file, held in parts], wanted[name])
            for name in names
        }
        super().__init__(path, args, stored, pads_vocabulary)

    @contextmanager
    def _open(self, file: Path) -> Iterator[GetSlice]:
        tensors = load_tensors(file)
        yield lambda name, box: tensors[name][box]
        tensors.clear()  # or the file stays mapped


def _files(path: Path) -> list[Path]:
    files = sorted(file for file in path.iterdir() if _FILE.fullmatch(file.name))
    numbers = [int(file.name.split(".")[1]) for file in files]
    if not files or numbers != list(range(len(files))):
        wanted = next(n for n in range(len(files) + 1) if n not in numbers)
        raise InvalidWeights(f"{path / f'consolidated.{wanted:02}.pth'}: is missing")
    return files


def _read_headers(file: Path) -> dict[str, tuple[str, tuple[int, ...]]]:
    """Return type and shape of each tensor; what they hold is not read."""
    found = {}
    for name, tensor in load_tensors(file).items():
        dtype = str(tensor.dtype).removeprefix("torch.")
        require_float(file, name, dtype)
        found[name] = (dtype, tuple(tensor.shape))
    return found


def load_tensors(file: Path) -> dict[str, Tensor]:
    """Return the tensors of a file, mapped; runs no code."""
    try:
        loaded: Any = torch.load(file, map_location="cpu", mmap=True, weights_only=True)  # noqa: TID251
    except Exception as error:  # torch does not document what a damaged file raises
        first = str(error).strip().splitlines()[0]
        raise InvalidWeights(f"{file}: cannot be read: {first}") from error
    if not isinstance(loaded, dict) or not all(isinstance(t, Tensor) for t in loaded.values()):
        raise InvalidWeights(f"{file}: is not a table of tensors")
    return {name: tensor for name, tensor in loaded.items() if name not in _DERIVED}


def _join(
    name: str, parts: list[tuple[Path, tuple[str, tuple[int, ...]]]], whole: tuple[int, ...]
) -> StoredTensor:
    """Return the tensor that the parts make up: joined along one dimension, or all alike."""
    dtype, shape = parts[0][1]
    if any(described != (dtype, shape) for _, described in parts):
        raise InvalidWeights(f"{parts[0][0].parent}: the parts of {name} differ in shape or type")
    if len(parts) == 1 or (len(shape) == 1 and shape == whole):
        file = parts[0][0]
        return StoredTensor(name, dtype, shape, (Part(file, (0,) * len(shape), shape),))
    # Embedding rows, which may be padded, are not compared: columns decide.
    dim = 1 if len(shape) == 2 and shape[1] * len(parts) == whole[1] else 0
    joined = tuple(n * len(parts) if d == dim else n for d, n in enumerate(shape))
    located = tuple(
        Part(file, tuple(number * shape[dim] * (d == dim) for d in range(len(shape))), shape)
        for number, (file, _) in enumerate(parts)
    )
    return StoredTensor(name, dtype, joined, located)
