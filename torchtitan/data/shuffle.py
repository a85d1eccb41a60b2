"""Orders that are a pure function of a key.

Random number generators may change their streams from one version to the next; a data order that is
stored in checkpoints must not. So an order here is "sort by hash", with the finaliser of SplitMix64
as the hash: for one key it maps different indices to different numbers, so there are no ties.
"""

import numpy as np

_MASK = 2**64 - 1
_STEP = 0x9E3779B97F4A7C15
_FACTORS = (0xBF58476D1CE4E5B9, 0x94D049BB133111EB)


def combine(*values: int) -> int:
    """A 64-bit key of the integers `values`; their order matters."""
    key = len(values)
    for value in values:
        key = _scramble(((key + value) * _STEP + _STEP) & _MASK)
    return key


def permutation(length: int, key: int) -> np.ndarray:
    """The numbers below `length`, int64 `[length]`, in an order given by `key`."""
    with np.errstate(over="ignore"):
        hashes = np.arange(1, length + 1, dtype=np.uint64) * np.uint64(_STEP) + np.uint64(key)
        hashes = (hashes ^ (hashes >> np.uint64(30))) * np.uint64(_FACTORS[0])
        hashes = (hashes ^ (hashes >> np.uint64(27))) * np.uint64(_FACTORS[1])
        hashes ^= hashes >> np.uint64(31)
    return np.argsort(hashes, kind="stable")


def _scramble(value: int) -> int:
    value = ((value ^ (value >> 30)) * _FACTORS[0]) & _MASK
    value = ((value ^ (value >> 27)) * _FACTORS[1]) & _MASK
    return value ^ (value >> 31)
