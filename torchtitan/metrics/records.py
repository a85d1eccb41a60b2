"""The records of a run, as `metrics.jsonl` holds them. No torch."""

import json
from collections.abc import Callable
from pathlib import Path
from typing import Any

from torchtitan.metrics.sinks import Record


def read_records(path: Path, keeps: Callable[[str], bool] | None = None) -> list[Record]:
    """Return the records in `path`, one curve by rising steps. Raises OSError.

    The file may be that of a run at work: lines that cannot be read are left out. Where the steps
    fall, a later start has trained them again, and its records replace the earlier ones. Unknown
    values are None. With `keeps`, records have only the keys for which it is true, and `step`.
    """
    records: list[Record] = []
    with open(path, "rb") as file:
        for line in file:
            record = _parsed(line)
            if record is None:
                continue
            step = record["step"]
            if records and step < records[-1]["step"]:
                while records and records[-1]["step"] >= step:
                    records.pop()
            if keeps is not None:
                kept = {key: value for key, value in record.items() if keeps(key)}
                record = kept | {"step": step}
            records.append(record)
    return records


def _parsed(line: bytes) -> dict[str, Any] | None:
    """Return the record in a line; None for one that is damaged or half written."""
    try:
        record = json.loads(line)
        return record if type(record["step"]) is int else None
    except (ValueError, KeyError, TypeError, RecursionError):
        return None
