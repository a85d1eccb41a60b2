"""Read a Hugging Face folder: one safetensors file, or several with an index."""

from collections.abc import Iterator, Mapping, Sequence
from contextlib import contextmanager
from dataclasses import replace
from pathlib import Path
from typing import Any

from safetensors import SafetensorError, safe_open

from torchtitan.models.decoder.args import DecoderArgs
from torchtitan.models.hf_weights import our_names
from torchtitan.models.spec import HFWeight
from torchtitan.weights.recognise import INDEX_NAME, InvalidWeights, read_json_object
from torchtitan.weights.source import (
    GetSlice,
    Part,
    StoredTensor,
    WeightSource,
    require_float,
    require_known,
)

_DTYPES = {"F16": "float16", "BF16": "bfloat16", "F32": "float32", "F64": "float64"}
_SINGLE = "model.safetensors"
_DERIVED = ".rotary_emb.inv_freq"
"""The end of the name of a table that follows from the config, in old files."""


class SafetensorsSource(WeightSource):
    """The weights of a Hugging Face folder. Raises `InvalidWeights`."""

    kind = "hf"

    def __init__(
        self,
        path: Path,
        table: Sequence[HFWeight],
        args: DecoderArgs,
        pads_vocabulary: bool = False,
    ):
        stored = _by_our_names(path, read_headers(path), table, args)
        super().__init__(path, args, stored, pads_vocabulary)
        _check_config(path, stored)

    @contextmanager
    def _open(self, file: Path) -> Iterator[GetSlice]:
        with _errors_of(file), safe_open(file, framework="pt") as opened:
            yield lambda name, box: opened.get_slice(name)[box]


def _by_our_names(
    path: Path, found: Mapping[str, StoredTensor], table: Sequence[HFWeight], args: DecoderArgs
) -> dict[str, StoredTensor]:
    untied = args.model_copy(update={"tied_embeddings": False})  # a head may be stored all the same
    stored, unknown = {}, []
    try:
        our_names((), table, args)
    except ValueError as error:  # of the whole model, not of a name
        raise InvalidWeights(f"{path}: {error}") from error
    for name, entry in found.items():
        try:
            row = our_names([name], table, untied)[name]
        except ValueError:
            unknown.append(name)
        else:
            stored[row.ours] = replace(entry, rope=row.rope)
    require_known(path, unknown)
    return stored


def read_headers(path: Path) -> dict[str, StoredTensor]:
    """Return what the files hold, by their names."""
    index = _read_index(path)
    files = [_only_file(path)] if index is None else _indexed_files(path, set(index.values()))
    found: dict[str, StoredTensor] = {}
    for file in files:
        if not file.is_file():
            listed = f", which {INDEX_NAME} lists" if index is not None else ""
            raise InvalidWeights(f"{file}: is missing{listed}")
        here = [] if index is None else [n for n, of in index.items() if of == file.name]
        with _errors_of(file), safe_open(file, framework="pt") as opened:
            names = set(opened.keys())
            if missing := sorted(set(here) - names):
                raise InvalidWeights(f"{file}: lacks {missing[0]}, which {INDEX_NAME} says it has")
            if index is not None and (extra := sorted(names - set(here))):
                raise InvalidWeights(
                    f"{file}: holds {extra[0]}, which {INDEX_NAME} does not say it has"
                )
            for name in sorted(names):
                if name.endswith(_DERIVED):
                    continue
                piece = opened.get_slice(name)
                dtype = _DTYPES.get(piece.get_dtype(), piece.get_dtype())
                require_float(file, name, dtype)
                shape = tuple(piece.get_shape())
                part = Part(file, (0,) * len(shape), shape)
                found[name] = StoredTensor(name, dtype, shape, (part,))
    return found


def _read_index(path: Path) -> dict[str, str] | None:
    """Return the file of each tensor, or None without an index."""
    file = path / INDEX_NAME
    if not file.exists():
        return None
    if (path / _SINGLE).exists():
        raise InvalidWeights(
            f"{path}: holds both {_SINGLE} and {INDEX_NAME}; remove the one that does not count"
        )
    weight_map: Any = read_json_object(file).get("weight_map")
    if not isinstance(weight_map, dict) or not weight_map:
        raise InvalidWeights(f"{file}: has no weight_map")
    for name, value in weight_map.items():
        if not isinstance(value, str) or Path(value).name != value or "\0" in value:
            raise InvalidWeights(f"{file}: {name} lies in {value!r}, not a file of this folder")
    return weight_map


def _indexed_files(path: Path, names: set[str]) -> list[Path]:
    """Return the files that an index names, each once."""
    files = [path / name for name in sorted(names)]
    places = {file.resolve(): file for file in files}
    if len(places) < len(files):
        twice = next(file for file in files if places[file.resolve()] != file)
        raise InvalidWeights(f"{path / INDEX_NAME}: names {twice.resolve()} twice")
    return files


def _only_file(path: Path) -> Path:
    """Return the file of a folder without an index."""
    files = sorted(path.glob("*.safetensors"))
    if path / _SINGLE in files or not files:
        return path / _SINGLE
    if len(files) > 1:
        raise InvalidWeights(
            f"{path}: holds {len(files)} safetensors files and no {INDEX_NAME}: one is missing"
        )
    if (path / "adapter_config.json").exists():
        raise InvalidWeights(f"{files[0]}: is an adapter, not a model; merge it into its base")
    return files[0]


def _check_config(path: Path, stored: dict[str, StoredTensor]) -> None:
    """Refuse a quantised model, and a vocabulary of another size than the embedding's."""
    file = path / "config.json"
    if not file.exists():
        return
    config = read_json_object(file)
    if config.get("quantization_config"):
        raise InvalidWeights(
            f"{file}: quantization_config: quantised weights are not read; take the model in"
            " bfloat16 or float32"
        )
    embedding, size = stored.get("tok_embeddings.weight"), config.get("vocab_size")
    if embedding is not None and isinstance(size, int) and embedding.shape[0] != size:
        raise InvalidWeights(
            f"{file}: vocab_size is {size}, but {embedding.name} has {embedding.shape[0]} rows"
        )


@contextmanager
def _errors_of(file: Path) -> Iterator[None]:
    try:
        yield
    except (SafetensorError, OSError) as error:
        raise InvalidWeights(f"{file}: cannot be read: {error}") from error
