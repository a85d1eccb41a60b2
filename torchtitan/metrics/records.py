"""The records of a run, as `metrics.jsonl` holds them. No torch."""

import json
from collections.abc import Collection
from pathlib import Path
from typing import Any

from torchtitan.metrics.sinks import Record


def read_records(path: Path, keys: Collection[str] | None = None) -> list[Record]:
    """Return the records in `path`, one curve by rising steps. Raises OSError.

    The file may be that of a run at work: lines that cannot be read are left out. Where the steps
    fall, a later start has trained them again, and its records replace the earlier ones. With
    `keys`, records have only these and `step`, which saves memory. Unknown values are None.
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
            if keys is not None:
                record = {key: value for key, value in record.items() if key in keys}
                record["step"] = step
            records.append(record)
    return records


def _parsed(line: bytes) -> dict[str, Any] | None:
    """Return the record in a line; None for one that is damaged or half written."""
    try:
        record = json.loads(line)
        return record if type(record["step"]) is int else None
    except (ValueError, KeyError, TypeError, RecursionError):
        return None
