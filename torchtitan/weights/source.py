"""Read weights of other programs: each rank its own slices, without communication.

A `WeightSource` knows from the headers of the files which tensors there are, and reads boxes of
them in our names and our order of rows. It reads at most `PIECE_BYTES` at a time straight into the
target, and closes files after `_MAPPED_BYTES`, since pages of a mapped file count as the process's
memory. So the memory beyond the target's is bounded, however large a tensor is.
"""

import itertools
import logging
import math
import time
from abc import ABC, abstractmethod
from collections.abc import Callable, Iterator, Mapping, Sequence
from contextlib import AbstractContextManager, ExitStack, closing
from dataclasses import dataclass
from pathlib import Path
from typing import Any, ClassVar

import torch
from torch import Tensor

from torchtitan.models.decoder.args import DecoderArgs
from torchtitan.models.family import ModelFamily
from torchtitan.models.hf_weights import interleave_rope
from torchtitan.parallel.initialize import local_indices
from torchtitan.utils.torch_compat import local_tensor
from torchtitan.weights.recognise import InvalidWeights, kind_of

logger = logging.getLogger(__name__)

PIECE_BYTES = 32 * 2**20
"""Bytes of the files that are read at a time."""
_MAPPED_BYTES = 64 * 2**20
_SECONDS_BETWEEN_LINES = 10.0
_MAX_LISTED = 5
_EMBEDDING, _HEAD = "tok_embeddings.weight", "output.weight"
_FLOATS = ("float16", "bfloat16", "float32", "float64")

GetSlice = Callable[[str, tuple[slice, ...]], Tensor]
"""Reads a box of a named tensor of an open file; the result may be a view of mapped memory."""


@dataclass(frozen=True)
class Part:
    """The part of a tensor that one file holds, and where it lies in the whole."""

    file: Path
    offsets: tuple[int, ...]
    shape: tuple[int, ...]


@dataclass(frozen=True)
class StoredTensor:
    """A tensor under its name in the files."""

    name: str
    dtype: str
    shape: tuple[int, ...]
    parts: tuple[Part, ...]
    rope: bool = False
    """See `HFWeight.rope`."""

    @property
    def row_bytes(self) -> int:
        """The bytes of one index of the first dimension."""
        return math.prod(self.shape[1:]) * torch_dtype_of(self.dtype).itemsize


class WeightSource(ABC):
    """The weights in a folder or file of another program."""

    kind: ClassVar[str]

    def __init__(
        self,
        path: Path,
        args: DecoderArgs,
        stored: Mapping[str, StoredTensor],
        pads_vocabulary: bool = False,
    ):
        """Take `stored` by our names, read from headers.

        A head that the files hold although `args` ties it is compared with the embedding when that
        is loaded. With `pads_vocabulary`, embedding and head get rows of zeros up to
        `args.vocab_size`.
        """
        for entry in stored.values():
            if not entry.shape:
                raise InvalidWeights(f"{path}: {entry.name} is a single number")
        self.path = path
        self.bytes_read = 0
        """Bytes of the files that `read` and `load` have touched; rows count whole."""
        self._head_size = args.head_size()
        self._stored = dict(stored)
        self._second_head = self._stored.pop(_HEAD, None) if args.tied_embeddings else None
        self.tensors: dict[str, dict[str, Any]] = {
            name: {"dtype": entry.dtype, "shape": list(entry.shape)}
            for name, entry in self._stored.items()
        }
        """Type and shape by our name, as in `Manifest.tensors`."""
        for name in (_EMBEDDING, _HEAD) if pads_vocabulary else ():
            if name in self.tensors:
                shape = self.tensors[name]["shape"]
                shape[0] = max(shape[0], args.vocab_size or 0)

    @property
    def files(self) -> list[Path]:
        """The files that hold the tensors."""
        entries = [*self._stored.values(), *filter(None, [self._second_head])]
        return sorted({part.file for entry in entries for part in entry.parts})

    @abstractmethod
    def _open(self, file: Path) -> AbstractContextManager[GetSlice]:
        """Open a file for reading slices."""

    def read(self, name: str, offsets: Sequence[int], sizes: Sequence[int]) -> Tensor:
        """Return a copy of a box of the tensor with our `name`, in our order and its own type."""
        target = torch.empty(tuple(sizes), dtype=torch_dtype_of(self._stored[name].dtype))
        with closing(_OpenFiles(self._open)) as files:
            self._fill(name, target, tuple(offsets), files)
        return target

    @torch.no_grad()
    def load(self, tensors: Mapping[str, Tensor]) -> None:
        """Fill this rank's parts of tensors in place, converting types that differ.

        Nothing is exchanged between ranks. Raises `InvalidWeights`.
        """
        for name, entry in self.tensors.items():
            rows = (self._stored[name].shape[0], entry["shape"][0])
            if rows[0] < rows[1]:
                logger.info("%s is padded from %d to %d rows, with zeros.", name, *rows)
        total = sum(local_tensor(tensor).nbytes for tensor in tensors.values())
        done, printed = 0, time.monotonic()
        with closing(_OpenFiles(self._open)) as files:
            for name in sorted(tensors, key=self._place):
                local = local_tensor(tensors[name])
                for inner, outer in _boxes(tensors[name]):
                    self._fill(name, local[inner], outer, files)
                done += local.nbytes
                if time.monotonic() - printed > _SECONDS_BETWEEN_LINES:
                    printed = time.monotonic()
                    text = "Loading %s: %.1f of %.1f GiB of this rank."
                    logger.info(text, self.path, done / 2**30, total / 2**30)

    def _place(self, name: str) -> tuple[str, int]:
        """Return a key that sorts tensors by their files, so that each is opened rarely."""
        return str(self._stored[name].parts[0].file), list(self._stored).index(name)

    def _fill(
        self, name: str, target: Tensor, offsets: tuple[int, ...], files: "_OpenFiles"
    ) -> None:
        """Fill `target` with the box at `offsets`, piece by piece."""
        stored = self._stored[name]
        known = max(0, min(len(target), stored.shape[0] - offsets[0]))  # the others are padding
        target[known:].zero_()
        step = max(1, PIECE_BYTES // max(1, stored.row_bytes))
        for start in range(0, known, step):
            rows = target[start : min(start + step, known)]
            begin = (offsets[0] + start, *offsets[1:])
            piece = self._piece(stored, begin, tuple(rows.shape), files)
            if name == _EMBEDDING and self._second_head is not None:
                self._compare(piece, begin, files)
            rows.copy_(piece)

    def _piece(
        self,
        stored: StoredTensor,
        offsets: tuple[int, ...],
        sizes: tuple[int, ...],
        files: "_OpenFiles",
    ) -> Tensor:
        if not stored.rope:
            return self._stored_box(stored, offsets, sizes, files)
        # A part of a head needs rows from both of its halves: read whole heads, and cut.
        size, start = self._head_size, offsets[0]
        low, high = start // size * size, -(-(start + sizes[0]) // size) * size
        heads = self._stored_box(stored, (low, *offsets[1:]), (high - low, *sizes[1:]), files)
        return interleave_rope(heads, size)[start - low :][: sizes[0]]

    def _stored_box(
        self,
        stored: StoredTensor,
        offsets: tuple[int, ...],
        sizes: tuple[int, ...],
        files: "_OpenFiles",
    ) -> Tensor:
        """Return a box in the order of the files."""
        num_bytes = sizes[0] * stored.row_bytes
        self.bytes_read += num_bytes
        found = [
            (part, box)
            for part in stored.parts
            if (box := _overlap(offsets, sizes, part)) is not None
        ]
        if len(found) == 1:
            part, (inside, _) = found[0]
            return files.get(part.file, num_bytes)(stored.name, inside)
        target = torch.empty(sizes, dtype=torch_dtype_of(stored.dtype))
        for part, (inside, place) in found:
            target[place] = files.get(part.file, num_bytes)(stored.name, inside)
        return target

    def _compare(self, piece: Tensor, offsets: tuple[int, ...], files: "_OpenFiles") -> None:
        head = self._second_head
        assert head is not None
        if not torch.equal(piece, self._piece(head, offsets, tuple(piece.shape), files)):
            raise InvalidWeights(
                f"{self.path}: {head.name} differs from the embedding, but the model ties them; set"
                " model.args.tied_embeddings = false"
            )


class _OpenFiles:
    """Files that are open; all are closed once enough of them is mapped."""

    def __init__(self, opener: Callable[[Path], AbstractContextManager[GetSlice]]):
        self._opener, self._stack = opener, ExitStack()
        self._open: dict[Path, GetSlice] = {}
        self._mapped = 0

    def get(self, file: Path, num_bytes: int) -> GetSlice:
        """Return an open file, of which `num_bytes` will be read."""
        if self._mapped + num_bytes > _MAPPED_BYTES:
            self.close()
        self._mapped += num_bytes
        if file not in self._open:
            self._open[file] = self._stack.enter_context(self._opener(file))
        return self._open[file]

    def close(self) -> None:
        """Close all files."""
        self._open.clear()
        self._stack.close()
        self._mapped = 0


def open_weights(
    path: Path, family: ModelFamily, args: Any, pads_vocabulary: bool = False
) -> WeightSource:
    """Open a Hugging Face folder, Meta's folder or a GGUF file for a model of `args`.

    Reads headers only. `pads_vocabulary`: see `WeightSource`.

    Raises:
        InvalidWeights: the files are damaged, do not belong together, or hold tensors that the
            family's table does not name.
    """
    if not isinstance(args, DecoderArgs) or not family.hf_weights:
        raise InvalidWeights(f"the family {family.name} declares no names of Hugging Face's")
    kind = kind_of(path)
    if kind == "hf":
        from torchtitan.weights.safetensors_source import SafetensorsSource

        return SafetensorsSource(path, family.hf_weights, args, pads_vocabulary)
    if kind == "meta":
        from torchtitan.weights.meta_source import MetaSource

        return MetaSource(path, family, args, pads_vocabulary)
    if kind == "gguf":
        from torchtitan.weights.gguf_source import GGUFSource

        return GGUFSource(path, family.hf_weights, args, pads_vocabulary)
    raise InvalidWeights(f"{path} holds no weights of Hugging Face, Meta or GGUF")


def torch_dtype_of(name: str) -> torch.dtype:
    """Return the type that a manifest calls `name`."""
    dtype: torch.dtype = getattr(torch, name)
    return dtype


def require_known(path: Path, unknown: Sequence[str]) -> None:
    """Raise `InvalidWeights` if there are tensors without a counterpart in the model."""
    if unknown:
        more = f" and {len(unknown) - _MAX_LISTED} more" if len(unknown) > _MAX_LISTED else ""
        names = ", ".join(unknown[:_MAX_LISTED])
        raise InvalidWeights(f"{path}: the model has no counterpart of {names}{more}")


def require_float(file: Path, name: str, dtype: str) -> None:
    """Raise `InvalidWeights` for a tensor that is not plain floating point."""
    if dtype not in _FLOATS:
        raise InvalidWeights(
            f"{file}: {name} is stored as {dtype}: quantised weights are not read; take the model"
            " in bfloat16 or float32"
        )


def _boxes(tensor: Tensor) -> Iterator[tuple[tuple[slice, ...], tuple[int, ...]]]:
    """Yield what this rank holds, as contiguous boxes: slices of the local part, global offsets."""
    for runs in itertools.product(*map(_runs, local_indices(tensor))):
        inner = tuple(slice(start, start + length) for start, _, length in runs)
        yield inner, tuple(first for _, first, _ in runs)


def _runs(indices: Tensor) -> list[tuple[int, int, int]]:
    """Return local start, first index and length of each run of consecutive indices."""
    if not len(indices):
        return []
    breaks = (torch.nonzero(indices.diff() != 1).flatten() + 1).tolist()
    bounds = [0, *breaks, len(indices)]
    return [(start, int(indices[start]), end - start) for start, end in itertools.pairwise(bounds)]


def _overlap(
    offsets: tuple[int, ...], sizes: tuple[int, ...], part: Part
) -> tuple[tuple[slice, ...], tuple[slice, ...]] | None:
    """Return the common box of a box and a part: slices of the part, and of the box."""
    inside, place = [], []
    for offset, size, start, length in zip(offsets, sizes, part.offsets, part.shape, strict=True):
        low, high = max(offset, start), min(offset + size, start + length)
        if low >= high:
            return None
        inside.append(slice(low - start, high - start))
        place.append(slice(low - offset, high - offset))
    return tuple(inside), tuple(place)
