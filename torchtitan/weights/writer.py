"""Write a model as a Hugging Face folder: safetensors, configuration and tokenizer.

The header of each safetensors file is written first, from names and shapes, then one tensor at a
time: the memory is that of the largest one.
"""

import json
import os
from collections.abc import Mapping
from pathlib import Path
from typing import Any, BinaryIO

import torch
from torch import Tensor

from torchtitan.models.hf_weights import hf_names, to_hf
from torchtitan.weights.hf_config import to_hf_config
from torchtitan.weights.model_card import model_card
from torchtitan.weights.recognise import INDEX_NAME, InvalidWeights
from torchtitan.weights.stored_model import StoredModel, read_tensors, target_dtype
from torchtitan.weights.tokenizer_files import (
    copy_tokenizer,
    folder_of_tokenizer,
    read_json,
)

_GENERATION = "generation_config.json"
_TYPES = {
    torch.float64: "F64",
    torch.float32: "F32",
    torch.bfloat16: "BF16",
    torch.float16: "F16",
}


def write_hf(
    folder: Path,
    model: StoredModel,
    token_ids: Mapping[str, Any],
    dtype: str | None = None,
    max_shard_size: str = "5GB",
) -> None:
    """Fill an empty folder; `dtype` None keeps the types of the weights.

    `token_ids`: such as `eos_token_id`, for the configs. Raises `InvalidWeights` for a model that
    no class of transformers computes, and what `read_tensors` raises; OSError.
    """
    try:
        config = _config(model, token_ids, dtype)
        shards = _shards(model, dtype, max_shard_size)
    except ValueError as error:
        raise InvalidWeights(f"{model.path} cannot be written for Hugging Face: {error}") from error
    for name, rows in shards.items():
        with open(folder / name, "xb") as file:
            _write_shard(file, model, rows, dtype)
            file.flush()
            os.fsync(file.fileno())
    if len(shards) > 1:
        weight_map = {row: name for name, rows in shards.items() for row in sorted(rows)}
        total = sum(meta.nbytes for rows in shards.values() for _, meta in rows.values())
        index = {"metadata": {"total_size": total}, "weight_map": weight_map}
        _write_json(folder / INDEX_NAME, index)
    _write_json(folder / "config.json", config)
    _write_json(folder / _GENERATION, _generation_config(model, token_ids))
    if model.tokenizer_path is not None:
        copy_tokenizer(model.tokenizer_path, folder)
    card = model_card(model, num_parameters=_num_parameters(shards), dtype=config["dtype"])
    (folder / "README.md").write_text(card, encoding="utf-8")


_Rows = dict[str, tuple[str, Tensor]]
"""Our name and a meta tensor, by their name."""


def _config(model: StoredModel, token_ids: Mapping[str, Any], dtype: str | None) -> dict[str, Any]:
    types = [target_dtype(entry, dtype) for entry in model.weights.tensors.values()]
    most = max(set(types), key=types.count)
    name = str(most).removeprefix("torch.")
    return to_hf_config(model.family, model.args, name, **token_ids)


def _shards(model: StoredModel, dtype: str | None, max_shard_size: str) -> dict[str, _Rows]:
    """Return the tensors of each file, in the order in which they are written."""
    from huggingface_hub import split_torch_state_dict_into_shards

    tensors = model.weights.tensors
    rows = hf_names(tensors, model.family.hf_weights, model.args)
    metas = {
        row.theirs: torch.empty(
            tensors[ours]["shape"], dtype=target_dtype(tensors[ours], dtype), device="meta"
        )
        for ours, row in sorted(rows.items(), key=lambda item: _layer_order(item[0]))
    }
    split = split_torch_state_dict_into_shards(metas, max_shard_size=max_shard_size)
    ours_of = {row.theirs: ours for ours, row in rows.items()}
    # Wide types first, so that every tensor is aligned.
    return {
        file: {
            name: (ours_of[name], metas[name])
            for name in sorted(names, key=lambda name: -metas[name].itemsize)
        }
        for file, names in split.filename_to_tensors.items()
    }


def _layer_order(name: str) -> tuple[int, int, str]:
    """Order embedding, layers by number, and the rest, whatever wrote the checkpoint."""
    parts = name.split(".")
    if parts[0] == "layers":
        return 1, int(parts[1]), name
    return (0 if parts[0] == "tok_embeddings" else 2), 0, name


def _write_shard(file: BinaryIO, model: StoredModel, rows: _Rows, dtype: str | None) -> None:
    header: dict[str, Any] = {"__metadata__": {"format": "pt"}}
    offset = 0
    for theirs, (_, meta) in rows.items():
        end = offset + meta.nbytes
        header[theirs] = {
            "dtype": _TYPES[meta.dtype],
            "shape": list(meta.shape),
            "data_offsets": [offset, end],
        }
        offset = end
    text = json.dumps(header, separators=(",", ":")).encode()
    text += b" " * (-len(text) % 8)
    file.write(len(text).to_bytes(8, "little") + text)
    names = [ours for ours, _ in rows.values()]
    for name, tensor in read_tensors(model.weights, names, dtype):
        (written,) = to_hf({name: tensor}, model.family.hf_weights, model.args).values()
        file.write(memoryview(written.contiguous().view(-1).view(torch.uint8).numpy()))


def _num_parameters(shards: Mapping[str, _Rows]) -> int:
    return sum(meta.numel() for rows in shards.values() for _, meta in rows.values())


def _generation_config(model: StoredModel, token_ids: Mapping[str, Any]) -> dict[str, Any]:
    """Return the tokens that begin and end a text, and what the original model's file says."""
    stored: dict[str, Any] = {}
    if model.tokenizer_path is not None:
        stored = read_json(folder_of_tokenizer(model.tokenizer_path) / _GENERATION)
    return {"_from_model_config": not stored, **token_ids, **stored}


def _write_json(file: Path, value: Mapping[str, Any]) -> None:
    file.write_text(json.dumps(value, indent=2) + "\n", encoding="utf-8")
