"""Recognise what kind of checkpoint a path holds. No torch."""

import json
from collections import Counter
from pathlib import Path
from typing import Literal

from torchtitan.config.errors import ConfigError

Kind = Literal["step", "dcp", "hf", "meta", "gguf", "torch"]
"""A step of this library, another folder of `torch.distributed.checkpoint`, a Hugging Face folder
with safetensors, Meta's `consolidated.*.pth`, a GGUF file, or files of `torch.save`."""

FOREIGN: tuple[Kind, ...] = ("hf", "meta", "gguf")
"""The kinds that `open_weights` reads."""

INDEX_NAME = "model.safetensors.index.json"
META_PARAMS = "params.json"

_GGUF_MAGIC = b"GGUF"
_TORCH_MAGICS = (b"PK\x03\x04", b"\x80\x02")


class InvalidWeights(Exception):
    """Weights cannot be used; the message says why and names the file."""


class UnreadableDescription(ConfigError):
    """The file that says what model the weights are of is damaged."""


def kind_of(path: Path) -> Kind | None:
    """Return the kind of checkpoint in a file or folder; None if there is none.

    Where a folder holds several, the first in the order of `Kind` counts.
    """
    if path.is_file():
        return _kind_of_file(path)
    if not path.is_dir():
        return None
    names = {entry.name for entry in path.iterdir()}
    if "manifest.json" in names:
        return "step"
    if ".metadata" in names:
        return "dcp"
    if INDEX_NAME in names or any(name.endswith(".safetensors") for name in names):
        return "hf"
    if META_PARAMS in names and any(name.startswith("consolidated.") for name in names):
        return "meta"
    if any(_kind_of_file(path / name) == "gguf" for name in names if name.endswith(".gguf")):
        return "gguf"
    if any(name.endswith((".bin", ".pt", ".pth")) for name in names):
        return "torch"
    if "config.json" in names:  # hyper-parameters without weights
        return "hf"
    return "meta" if META_PARAMS in names else None


def gguf_file(path: Path) -> Path:
    """Return the GGUF file that `path` is or holds. Raises `InvalidWeights` if it holds several."""
    if path.is_file():
        return path
    found = sorted(path.glob("*.gguf"))
    if len(found) != 1:
        names = ", ".join(file.name for file in found)
        raise InvalidWeights(f"{path} holds {len(found)} GGUF files ({names}); name one of them")
    return found[0]


def read_json_object(file: Path) -> dict[str, object]:
    """Return a JSON file's object. Raises `InvalidWeights`, also for a key that appears twice."""

    def unique(pairs: list[tuple[str, object]]) -> dict[str, object]:
        counts = Counter(key for key, _ in pairs)
        twice = [key for key, count in counts.items() if count > 1]
        if twice:
            raise InvalidWeights(f"{file}: names {twice[0]} twice")
        return dict(pairs)

    try:
        value = json.loads(file.read_text("utf-8"), object_pairs_hook=unique)
    except (OSError, ValueError, RecursionError) as error:
        reason = error.strerror if isinstance(error, OSError) else error
        raise InvalidWeights(f"{file}: cannot be read: {reason}") from error
    if not isinstance(value, dict):
        raise InvalidWeights(f"{file}: is not a JSON object")
    return value


def _kind_of_file(file: Path) -> Kind | None:
    with file.open("rb") as opened:
        magic = opened.read(4)
    if magic == _GGUF_MAGIC:
        return "gguf"
    return "torch" if magic.startswith(_TORCH_MAGICS) else None
