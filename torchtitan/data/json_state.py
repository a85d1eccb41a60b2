"""The state of a dataset as JSON: plain values as they are, other types in a tagged dict."""

import base64
from collections.abc import Mapping
from typing import Any

import numpy as np

_TAG = "__type__"
"""Key of a dict in a stored state that stands for a value that JSON does not have."""


def encode_state(value: Any) -> Any:
    """Return a state as JSON values. Raises TypeError for a type that has no form here."""
    import torch

    if value is None or isinstance(value, bool | int | float | str):
        return value.item() if isinstance(value, np.generic) else value
    if isinstance(value, list):
        return [encode_state(item) for item in value]
    if isinstance(value, Mapping):
        if all(isinstance(key, str) for key in value) and _TAG not in value:
            return {key: encode_state(item) for key, item in value.items()}
        return {
            _TAG: "dict",
            "items": [[encode_state(k), encode_state(v)] for k, v in value.items()],
        }
    if type(value) is tuple:
        return {_TAG: "tuple", "items": [encode_state(item) for item in value]}
    if isinstance(value, bytes):
        return {_TAG: "bytes", "data": base64.b64encode(value).decode()}
    if isinstance(value, torch.Tensor):
        return {**encode_state(value.detach().cpu().numpy()), _TAG: "tensor"}
    if isinstance(value, np.ndarray | np.generic) and value.dtype.kind in "biuf":
        array = np.asarray(value, order="C")
        data = base64.b64encode(array.tobytes()).decode()
        kind = "array" if isinstance(value, np.ndarray) else "scalar"
        return {_TAG: kind, "dtype": array.dtype.str, "shape": array.shape, "data": data}
    raise TypeError(f"it holds a {type(value).__name__}")


def decode_state(value: Any) -> Any:
    """Return the state of which `encode_state` made `value`."""
    if isinstance(value, list):
        return [decode_state(item) for item in value]
    if not isinstance(value, dict):
        return value
    kind = value.get(_TAG)
    if kind == "dict":
        return {decode_state(key): decode_state(item) for key, item in value["items"]}
    if kind == "tuple":
        return tuple(decode_state(item) for item in value["items"])
    if kind == "bytes":
        return base64.b64decode(value["data"])
    if kind in ("array", "scalar", "tensor"):
        import torch

        content = bytearray(base64.b64decode(value["data"]))
        array = np.frombuffer(content, value["dtype"]).reshape(value["shape"])
        if kind == "scalar":
            return array[()]
        return torch.from_numpy(array) if kind == "tensor" else array
    return {key: decode_state(item) for key, item in value.items()}
