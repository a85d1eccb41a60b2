"""Write a model as Meta does: `consolidated.00.pth` and `params.json`."""

import json
from pathlib import Path

import torch

from torchtitan.models.llama3 import LlamaArgs
from torchtitan.weights.meta_params import to_meta_params
from torchtitan.weights.recognise import META_PARAMS, InvalidWeights
from torchtitan.weights.stored_model import StoredModel, read_tensors
from torchtitan.weights.tokenizer_files import copy_tokenizer

_HEAD, _EMBEDDING = "output.weight", "tok_embeddings.weight"


def write_meta(folder: Path, model: StoredModel, dtype: str | None = None) -> None:
    """Fill an empty folder; needs as much memory as the weights are large.

    Meta's code has no tied embeddings: a tied head is written, too. Raises `InvalidWeights` for a
    model that Meta's code does not compute, and what `read_tensors` raises; OSError.
    """
    try:
        if not isinstance(model.args, LlamaArgs) or model.args.norm_type.endswith("layernorm"):
            raise ValueError("Meta's code has Llamas with RMSNorm only")
        params = to_meta_params(model.args)
    except ValueError as error:
        raise InvalidWeights(f"{model.path} cannot be written for Meta's code: {error}") from error
    names = model.weights.tensors
    tensors = dict(read_tensors(model.weights, names, dtype))
    if model.args.tied_embeddings:
        tensors[_HEAD] = tensors[_EMBEDDING]
    torch.save(tensors, folder / "consolidated.00.pth")
    (folder / META_PARAMS).write_text(json.dumps(params, indent=2) + "\n", encoding="utf-8")
    if model.tokenizer_path is not None:
        copy_tokenizer(model.tokenizer_path, folder)
