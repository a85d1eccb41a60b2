"""Numbers and lists as messages show them."""

from collections.abc import Sequence


def format_bytes(number: float) -> str:
    """Return bytes with three significant digits and a unit: `704 bytes`, `1.5 MiB`."""
    for power, unit in ((4, "TiB"), (3, "GiB"), (2, "MiB"), (1, "KiB")):
        if number >= 1024**power:
            return f"{number / 1024**power:.{1 if number < 100 * 1024**power else 0}f} {unit}"
    return f"{number:.0f} bytes"


def plural(count: int, noun: str) -> str:
    """Return "1 lane" or "2 lanes"."""
    return f"{count:,} {noun}{'' if count == 1 else 's'}"


def some_of(texts: Sequence[str], most: int = 3, separator: str = ", ") -> str:
    """Return the first few of `texts`, and how many there are besides."""
    rest = [f"and {len(texts) - most} more"] if len(texts) > most else []
    return separator.join([*texts[:most], *rest])
