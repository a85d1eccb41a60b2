"""Files of one dataset that hold the same documents."""

from collections import defaultdict
from collections.abc import Iterator, Mapping
from typing import TYPE_CHECKING, Any

from torchtitan.config.errors import ConfigIssue
from torchtitan.data.contents import content_digests

if TYPE_CHECKING:
    from torchtitan.data.sources import Source

_COMPARED_FILES = 20_000
_SHOWN_PAIRS = 3
_NOTED_BYTES, _NOTED_SHARE = 2**16, 0.01
"""A file of this size, or this share of the data, is worth a warning: source code, for example,
has many small files that are equal."""


def doubled_files(source: "Source") -> list[ConfigIssue]:
    """A warning about files of a dataset that hold the same, with the pairs."""
    pairs = dict.fromkeys((*getattr(source, "doubles", ()), *_same_contents(source)))
    if not pairs:
        return []
    shown = "; ".join(f"{first} and {second}" for first, second in list(pairs)[:_SHOWN_PAIRS])
    more = f"; and {len(pairs) - _SHOWN_PAIRS:,} more pairs" if len(pairs) > _SHOWN_PAIRS else ""
    return [
        ConfigIssue(
            "training.dataset_path",
            f"seems to hold the same documents twice: {shown}{more}",
            "leave out one of each pair, unless that is meant",
            severity="warning",
        )
    ]


def _same_contents(source: "Source") -> Iterator[tuple[str, str]]:
    """Files of equal size and digest, but for small ones."""
    all_files = getattr(source, "files", ())
    least = min(_NOTED_BYTES, _NOTED_SHARE * sum(file.size for file in all_files))
    sizes: Mapping[int, list[Any]] = defaultdict(list)
    for file in all_files:
        if file.size >= least:
            sizes[file.size].append(file)
    suspects = [file for files in sizes.values() if len(files) > 1 for file in files]
    if len(suspects) > _COMPARED_FILES:
        return
    seen: dict[tuple[int, str], str] = {}
    for file, digest in zip(suspects, content_digests(suspects)):
        first = seen.setdefault((file.size, digest), file.path)
        if first != file.path:
            yield first, file.path
