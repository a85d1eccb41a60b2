"""Map names of number formats in a config to torch's dtypes."""

import torch

_DTYPES = {
    "float16": torch.float16,
    "bfloat16": torch.bfloat16,
    "float32": torch.float32,
    "float64": torch.float64,
}


def torch_dtype(name: str) -> torch.dtype:
    """Return the dtype of a name in a config."""
    return _DTYPES[name]


def at_least_float32(dtype: torch.dtype) -> torch.dtype:
    """Return the format to compute sums and exponentials in: float32, or float64 for float64."""
    return torch.float64 if dtype == torch.float64 else torch.float32


class default_dtype:
    """A context in which new floating point tensors have this type."""

    def __init__(self, dtype: torch.dtype):
        self._dtype = dtype

    def __enter__(self) -> None:
        self._previous = torch.get_default_dtype()
        torch.set_default_dtype(self._dtype)

    def __exit__(self, *details: object) -> None:
        torch.set_default_dtype(self._previous)
