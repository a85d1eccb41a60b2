"""The record of a run's steps: loss, gradient norm and digests, to the last bit. No torch.

`record.jsonl` has a line for each start of the run, with its config, mesh and versions, and a line
for each recorded step after it. Numbers are hexadecimal, as Python writes them, and so may be NaN
or infinite.
"""

import json
import math
from collections.abc import Mapping
from dataclasses import dataclass
from pathlib import Path
from typing import Any

from torchtitan.parallel.digest import Digest


@dataclass(frozen=True)
class StepRecord:
    """The record of one step."""

    step: int
    loss: float
    norm: float
    gradients: Mapping[str, Digest]
    """By parameter, before clipping."""
    start: Mapping[str, Any]
    """The start of the run that trained it: `config` (TOML), `mesh`, `device`, `versions`."""

    @property
    def is_finite(self) -> bool:
        """Return True if loss and gradient norm are finite."""
        return math.isfinite(self.loss) and math.isfinite(self.norm)


def start_line(step: int, start: Mapping[str, Any]) -> dict[str, Any]:
    """Return the line of a start after `step`."""
    return {"step": step, "start": dict(start)}


def step_line(
    step: int, loss: float, norm: float, gradients: Mapping[str, Digest]
) -> dict[str, Any]:
    """Return the line of a step."""
    entries = {
        name: [hex(found.bits), *map(float.hex, (found.norm, *found.projections))]
        for name, found in gradients.items()
    }
    return {"step": step, "loss": loss.hex(), "grad_norm": norm.hex(), "gradients": entries}


def read_records(file: Path) -> dict[int, StepRecord]:
    """Return what a file has recorded, by step; nothing if there is none.

    A line that is damaged, or that a killed process did not finish, is left out.
    """
    records: dict[int, StepRecord] = {}
    start: Mapping[str, Any] = {}
    try:
        lines = file.read_bytes().splitlines()
    except FileNotFoundError:
        return {}
    for line in lines:
        try:
            entry = json.loads(line)
        except ValueError:
            continue
        if "start" in entry:
            start = entry["start"]
            continue
        gradients = {
            name: Digest(int(bits, 16), float.fromhex(norm), tuple(map(float.fromhex, projections)))
            for name, (bits, norm, *projections) in entry["gradients"].items()
        }
        loss, norm = (float.fromhex(entry[key]) for key in ("loss", "grad_norm"))
        records[entry["step"]] = StepRecord(entry["step"], loss, norm, gradients, start)
    return records
