"""Numbers and lists as messages show them."""

from collections.abc import Sequence


def format_bytes(number: float) -> str:
    """Return bytes with three significant digits and a unit: `704 bytes`, `1.5 MiB`."""
    for power, unit in ((4, "TiB"), (3, "GiB"), (2, "MiB"), (1, "KiB")):
        if number >= 1024**power:
            return f"{number / 1024**power:.{1 if number < 100 * 1024**power else 0}f} {unit}"
    return f"{number:.0f} bytes"


def plural(count: int, noun: str) -> str:
    """Return "1 lane" or "2 lanes", "2 processes", "2 microbatches"."""
    ending = "es" if noun.endswith(("s", "x", "ch", "sh")) else "s"
    return f"{count:,} {noun}{'' if count == 1 else ending}"


def format_duration(seconds: float) -> str:
    """Return a time in its two largest units: `4.2s`, `31s`, `3m12s`, `2h05m`, `4d07h`."""
    if seconds < 9.95:
        return f"{seconds:.1f}s"
    minutes, rest = divmod(round(seconds), 60)
    if minutes == 0:
        return f"{rest}s"
    hours, minutes = divmod(minutes, 60)
    if hours == 0:
        return f"{minutes}m{rest:02d}s"
    days, hours = divmod(hours, 24)
    return f"{days}d{hours:02d}h" if days else f"{hours}h{minutes:02d}m"


def some_of(texts: Sequence[str], most: int = 3, separator: str = ", ") -> str:
    """Return the first few of `texts`, and how many there are besides."""
    rest = [f"and {len(texts) - most} more"] if len(texts) > most else []
    return separator.join([*texts[:most], *rest])
