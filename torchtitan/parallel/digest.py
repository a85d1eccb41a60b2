"""The digest of a gradient, and how far two gradients are from each other by it. No torch."""

import math
from typing import NamedTuple


class Digest(NamedTuple):
    """Sums over the elements of a whole gradient, wherever they are."""

    bits: int
    """The sum, modulo 2^64, of the elements' bits times odd hashes of their indices. One element
    that changes changes it; two that are exchanged do, but for chance."""
    norm: float
    """The 2-norm."""
    projections: tuple[float, ...]
    """Sums of the elements with signs by chance. Their differences, over the norm, are about the
    relative difference of two gradients: small after rounding, and large after a mistake."""

    def difference(self, other: "Digest") -> float:
        """Return about how far the gradients are from each other, relative to the larger norm."""
        pairs = zip((self.norm, *self.projections), (other.norm, *other.projections), strict=True)
        size = max(self.norm, other.norm)
        return max(difference(a, b, size) for a, b in pairs)


def difference(one: float, other: float, size: float | None = None) -> float:
    """Return the difference of two numbers relative to `size`, by default that of the larger one.

    It is 0 if neither is finite, and infinite if one is not.
    """
    if one == other or not (math.isfinite(one) or math.isfinite(other)):
        return 0.0
    found = abs(one - other) / (max(abs(one), abs(other)) if size is None else size)
    return math.inf if math.isnan(found) else found
