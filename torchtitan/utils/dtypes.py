"""Names of number formats in a config, and torch's objects for them."""

import torch

_DTYPES = {"float32": torch.float32, "bfloat16": torch.bfloat16, "float64": torch.float64}


def torch_dtype(name: str) -> torch.dtype:
    """The dtype of a config's name for it."""
    return _DTYPES[name]
