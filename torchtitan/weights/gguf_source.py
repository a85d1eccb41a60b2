"""Read a GGUF file of a Llama or Qwen3; the package `gguf` dequantises quantised types."""

from collections.abc import Iterator, Sequence
from contextlib import contextmanager
from dataclasses import dataclass, replace
from pathlib import Path
from typing import Any

import numpy as np
import torch
from torch import Tensor

from torchtitan.models.decoder.args import DecoderArgs
from torchtitan.models.spec import HFWeight
from torchtitan.weights.gguf_metadata import gguf_reader
from torchtitan.weights.recognise import InvalidWeights, gguf_file
from torchtitan.weights.source import GetSlice, Part, StoredTensor, WeightSource, require_known

IN_HALVES = {"llama": False, "qwen3": True}
"""GGUF's architectures that are read and written. True: RoPE pairs the halves of a head, and rows
are in Hugging Face's order; else they are in ours."""
_DERIVED = ("rope_freqs.weight",)
"""Llama 3.1's RoPE scaling, which `gguf_metadata` reads."""


@dataclass(frozen=True)
class _Encoded:
    """Place of a tensor's bytes: rows of blocks of a GGML type."""

    ggml_type: Any
    offset: int
    dtype: np.dtype[Any]
    shape: tuple[int, ...]


class GGUFSource(WeightSource):
    """The weights of a GGUF file, as float32. Raises `InvalidWeights`.

    Needs the extra `gguf`.
    """

    kind = "gguf"

    def __init__(
        self,
        path: Path,
        table: Sequence[HFWeight],
        args: DecoderArgs,
        pads_vocabulary: bool = False,
    ):
        file = gguf_file(path)
        reader, architecture = _open_reader(file)
        names = gguf_names(table, args.n_layers, architecture)
        self._encoded: dict[str, _Encoded] = {}
        stored, unknown = {}, []
        for tensor in reader.tensors:
            if tensor.name in _DERIVED:
                continue
            if tensor.name not in names:
                unknown.append(tensor.name)
                continue
            shape = tuple(int(size) for size in reversed(tensor.shape))
            self._encoded[tensor.name] = _Encoded(
                tensor.tensor_type, int(tensor.data_offset), tensor.data.dtype, tensor.data.shape
            )
            part = Part(file, (0,) * len(shape), shape)
            row = names[tensor.name]
            stored[row.ours] = StoredTensor(tensor.name, "float32", shape, (part,), row.rope)
        require_known(path, unknown)
        super().__init__(path, args, stored, pads_vocabulary)

    @contextmanager
    def _open(self, file: Path) -> Iterator[GetSlice]:
        def get(name: str, box: tuple[slice, ...]) -> Tensor:
            from gguf import dequantize

            encoded = self._encoded[name]
            mapped = np.memmap(
                file, encoded.dtype, mode="r", offset=encoded.offset, shape=encoded.shape
            )
            rows = dequantize(np.array(mapped[box[0]]), encoded.ggml_type)
            columns = (slice(None), *box[1:])
            return torch.from_numpy(rows)[columns]

        yield get


def gguf_names(table: Sequence[HFWeight], n_layers: int, architecture: str) -> dict[str, HFWeight]:
    """Return the table's row of each of GGUF's names, with the layer's number filled in.

    The package knows Hugging Face's names. `rope` is set where rows have their order.
    """
    from gguf import MODEL_ARCH, get_tensor_name_map

    known = get_tensor_name_map(MODEL_ARCH[architecture.upper()], n_layers)
    names = {}
    for row in table:
        for layer in range(n_layers) if "{n}" in row.ours else (0,):
            ours, theirs = (side.replace("{n}", str(layer)) for side in (row.ours, row.theirs))
            name = known.get_name(theirs, try_suffixes=(".weight", ".bias"))
            if name is not None:
                rope = row.rope and IN_HALVES[architecture]
                names[name] = replace(row, ours=ours, theirs=theirs, rope=rope)
    return names


def _open_reader(file: Path) -> tuple[Any, str]:
    try:
        reader = gguf_reader(file)
    except ImportError as error:
        raise InvalidWeights(
            f"{file}: reading GGUF needs the package gguf: pip install gguf"
        ) from error
    except Exception as error:  # the package does not document what a damaged file raises
        raise InvalidWeights(f"{file}: cannot be read: {error}") from error
    field = reader.get_field("general.architecture")
    architecture = None if field is None else field.contents()
    if architecture not in IN_HALVES:
        known = " and ".join(IN_HALVES)
        raise InvalidWeights(
            f"{file}: general.architecture is {architecture!r}; only {known} are read"
        )
    return reader, architecture
