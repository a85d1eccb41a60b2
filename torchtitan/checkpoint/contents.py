"""Any checkpoint opened to look into: its tensors piece by piece, and what is known of the model.

Tensors have our names and our order of rows, whatever the format, so that any two checkpoints of a
model can be compared. At most a tensor, or `_BATCH_BYTES` of small ones, is in memory at once.
"""

import math
from collections.abc import Iterator, Mapping, Sequence
from dataclasses import dataclass, replace
from pathlib import Path
from typing import Any

import torch
from torch import Tensor

from torchtitan.checkpoint.manifest import (
    OPTIMIZER_PREFIX,
    InvalidCheckpoint,
    Manifest,
    tensor_differences,
)
from torchtitan.checkpoint.model_folder import ModelFolder, read_model_folder
from torchtitan.config.errors import ConfigError
from torchtitan.models.registry import get_family
from torchtitan.models.spec import ModelArgs
from torchtitan.weights.description import describe_model
from torchtitan.weights.recognise import FOREIGN, InvalidWeights, kind_of
from torchtitan.weights.source import WeightSource, open_weights

_BATCH_BYTES = 256 * 2**20
_PIECE_ELEMENTS = 4 * 2**20
_EMBEDDING = "tok_embeddings.weight"


@dataclass(frozen=True)
class Contents:
    """A checkpoint whose names, shapes and types have been read and fit together."""

    path: Path
    kind: str
    tensors: Mapping[str, dict[str, Any]]
    """The model's, as in `Manifest.tensors`."""
    source: ModelFolder | WeightSource
    family: str | None = None
    args: ModelArgs | None = None
    """None where the checkpoint does not say, or the family is not registered."""
    notices: tuple[str, ...] = ()

    @property
    def manifest(self) -> Manifest | None:
        """The manifest of a step."""
        return self.source.manifest if isinstance(self.source, ModelFolder) else None

    @property
    def optimizer(self) -> dict[str, dict[str, Any]]:
        """The tensors of optimizer state, by name."""
        tensors = {} if self.manifest is None else self.manifest.tensors
        return {n: entry for n, entry in tensors.items() if n.startswith(OPTIMIZER_PREFIX)}

    def pieces(self, names: Sequence[str]) -> Iterator[tuple[str, Tensor]]:
        """Yield parts of the named tensors in order, cut alike for every kind of checkpoint.

        Raises `InvalidCheckpoint` or `InvalidWeights` for what cannot be read.
        """
        if isinstance(self.source, WeightSource):
            for name in names:
                shape = self.tensors[name]["shape"]
                for start, rows in _cuts(shape):
                    offsets = (start, *[0] * (len(shape) - 1))
                    yield name, self.source.read(name, offsets, (rows, *shape[1:]))
            return
        tensors = {**self.tensors, **self.optimizer}
        for batch in _batches(names, tensors):
            whole = {n: torch.empty(e["shape"], dtype=_dtype(e)) for n, e in batch.items()}
            try:
                self.source.load(whole)
            except Exception as error:  # torch does not document what a damaged file raises
                raise InvalidCheckpoint(f"{self.path}: cannot be read: {error}") from error
            for name in batch:
                tensor = whole.pop(name)
                for start, rows in _cuts(list(tensor.shape)):
                    yield name, tensor[start : start + rows] if tensor.dim() else tensor


@dataclass
class TensorStats:
    """Values of a tensor: of finite ones the L2 norm and the largest magnitude, others counted."""

    norm: float = 0.0
    largest: float = 0.0
    non_finite: int = 0

    def add(self, piece: Tensor) -> None:
        """Take a further part of the tensor into account."""
        values = piece.double()
        finite = values.isfinite()
        self.non_finite += values.numel() - int(finite.sum())
        values = torch.where(finite, values, 0.0).abs()
        self.norm = math.hypot(self.norm, float(values.norm()))
        self.largest = max(self.largest, float(values.max()) if values.numel() else 0.0)


def open_contents(path: Path) -> Contents:
    """Open a step, a folder of weights or a GGUF file, of a kind that `kind_of` knows.

    Raises:
        InvalidCheckpoint, InvalidWeights: damaged, or not what its hyper-parameters say.
        ConfigError: it is of a model that this library does not know.
    """
    kind = kind_of(path)
    if kind in FOREIGN:
        return _open_foreign(path, kind)
    assert kind in ("step", "dcp")
    folder = read_model_folder(path)
    contents = Contents(path, kind, folder.tensors, folder)
    if folder.manifest is None:
        return replace(contents, notices=("Without a manifest, damage may not be noticed.",))
    try:
        description = describe_model(path)
        args = description.resolved()
    except ConfigError as error:  # such as a family of another package
        return replace(contents, notices=(f"Its hyper-parameters are unknown: {error}",))
    return replace(contents, family=description.family, args=args, notices=description.notices)


def _open_foreign(path: Path, kind: str) -> Contents:
    description = describe_model(path)
    family, args = get_family(description.family), description.resolved()
    # Meta's files may leave the vocabulary to the tokenizer; its size is that of the embedding.
    known = args.vocab_size is not None
    source = open_weights(path, family, args if known else _with_vocabulary(args, 1))
    if not known and _EMBEDDING in source.tensors:
        args = _with_vocabulary(args, source.tensors[_EMBEDDING]["shape"][0])
    with torch.device("meta"):
        parameters = dict(family.build(args).named_parameters())
    wanted = {
        name: {**source.tensors.get(name, {"dtype": "float32"}), "shape": list(parameter.shape)}
        for name, parameter in parameters.items()
    }
    if found := tensor_differences(source.tensors, [wanted]):
        raise InvalidWeights(f"{path}: does not fit {description.source}: {found}")
    tensors = {name: source.tensors[name] for name in parameters}  # in the model's order
    return Contents(path, kind, tensors, source, family.name, args, description.notices)


def _with_vocabulary(args: ModelArgs, size: int) -> ModelArgs:
    return args.model_copy(update={"vocab_size": size})


def largest_difference(one: Tensor, other: Tensor) -> float:
    """Return the largest difference of two parts; equal infinities and NaN do not differ."""
    if one.dtype == other.dtype and torch.equal(one, other):
        return 0.0
    left, right = one.double(), other.double()
    same = (left == right) | (left.isnan() & right.isnan())
    apart = torch.where(same, 0.0, (left - right).abs())
    return float(apart.nan_to_num(nan=math.inf, posinf=math.inf).max()) if apart.numel() else 0.0


def _cuts(shape: Sequence[int]) -> Iterator[tuple[int, int]]:
    """Yield first row and number of rows of the parts of a tensor."""
    rows = shape[0] if shape else 1
    step = max(1, _PIECE_ELEMENTS // max(1, math.prod(shape[1:])))
    for start in range(0, rows, step):
        yield start, min(step, rows - start)


def _batches(
    names: Sequence[str], tensors: Mapping[str, dict[str, Any]]
) -> Iterator[dict[str, dict[str, Any]]]:
    """Part names into groups that are loaded together; a load has a cost of its own."""
    batch: dict[str, dict[str, Any]] = {}
    size = 0
    for name in names:
        more = num_bytes(tensors[name])
        if batch and size + more > _BATCH_BYTES:
            yield batch
            batch, size = {}, 0
        batch[name] = tensors[name]
        size += more
    if batch:
        yield batch


def num_bytes(entry: Mapping[str, Any]) -> int:
    """Return the bytes of a tensor from its type and shape."""
    return math.prod(entry["shape"]) * _dtype(entry).itemsize


def _dtype(entry: Mapping[str, Any]) -> torch.dtype:
    dtype: torch.dtype = getattr(torch, entry["dtype"])
    return dtype
