"""The comparison of a step with its replay. No torch."""

import json
import math
from collections.abc import Iterator, Mapping
from dataclasses import dataclass
from pathlib import Path
from typing import Any

from torchtitan.checkpoint.stored_run import METRICS_NAME, RECORD_NAME, STATUS_NAME
from torchtitan.commands.printing import json_values
from torchtitan.config.errors import ConfigError, ConfigIssue
from torchtitan.config.schema import JobConfig
from torchtitan.data.ledger import LedgerStep, read_ledger
from torchtitan.metrics.records import read_records as read_metrics
from torchtitan.parallel.digest import difference
from torchtitan.training.replay import Prepared, degrees_of
from torchtitan.training.step_record import StepRecord, read_records
from torchtitan.utils.text import plural, some_of

_BOUNDS = {"float64": 1e-13, "float32": 1e-5, "bfloat16": 0.1}
"""Bounds of one step by the type that computes: 6 to 33 times the differences between meshes that
docs/guides/debugging.md reports."""
_LARGEST_BOUND = 0.3
"""Below what a factor of 2 or 1/2 does, which a bound that grows with the steps would hide."""


@dataclass(frozen=True)
class Known:
    """One step, as the folder of a run knows it."""

    folder: Path
    step: int
    records: Mapping[int, StepRecord]
    metrics: Mapping[str, Any] | None
    """Its line in metrics.jsonl."""
    failure: str
    """The error with which the step has ended the run, if it has."""
    ledger: LedgerStep | None

    @property
    def record(self) -> StepRecord | None:
        """Return its record."""
        return self.records.get(self.step)

    @property
    def numbers(self) -> tuple[float, float] | None:
        """Return loss and gradient norm; metrics.jsonl does not tell NaN from infinity."""
        if self.record is not None:
            return self.record.loss, self.record.norm
        if self.metrics is None:
            return None
        values = (self.metrics.get(key) for key in ("loss", "grad_norm"))
        loss, norm = (math.nan if value is None else float(value) for value in values)
        return loss, norm

    @property
    def is_finite(self) -> bool:
        """Return True if loss and gradient norm are finite; a spike may end a run, too."""
        if self.numbers is None:
            return "not finite" not in self.failure
        return all(map(math.isfinite, self.numbers))

    def require(self) -> None:
        """Raise ConfigError if nothing is known to compare with."""
        if self.numbers is None and not self.failure:
            steps = some_of(list(map(str, self.records)), most=12) or "none"
            text = f"is neither in {RECORD_NAME} of {self.folder}, which has {steps}, nor logged"
            fix = "name one of these" if self.records else "train with debug.record = 1"
            raise ConfigError(ConfigIssue("STEP", text, fix, self.step))


def known_of(folder: Path, step: int) -> Known:
    """Return what a run's folder knows of a step."""
    metrics = _line_of(folder / METRICS_NAME, step)
    try:
        status = json.loads((folder / STATUS_NAME).read_text(encoding="utf-8"))
        error = str(status.get("error") or "")
    except (OSError, ValueError, AttributeError):
        error = ""
    failure = error if error.startswith(f"step {step}: ") else ""
    ledger = read_ledger(folder).get(step)
    return Known(folder, step, read_records(folder / RECORD_NAME), metrics, failure, ledger)


def _line_of(file: Path, step: int) -> dict[str, Any] | None:
    """Return the line about a step, not that of its validation."""
    try:
        rows = read_metrics(file)
    except OSError:
        return None
    return next((row for row in rows if row["step"] == step and "grad_norm" in row), None)


def bound_of(prepared: Prepared, step: int) -> float:
    """Return the largest relative difference that counts as rounding.

    Each step since the checkpoint starts from weights that the one before has rounded otherwise.
    """
    types: set[str] = set()
    for training in (prepared.original.training, prepared.config.training):
        types |= {training.dtype, training.mixed_precision_param, training.mixed_precision_reduce}
    bound = math.sqrt(step - prepared.start) * max(_BOUNDS[dtype] for dtype in types)
    return min(bound, _LARGEST_BOUND)


def compare(prepared: Prepared, before: Known, now: Known) -> dict[str, Any]:
    """Return the report, as JSON values."""
    step, config = now.step, prepared.config
    bound = bound_of(prepared, step)
    report: dict[str, Any] = {"step": step, "start": prepared.start, "bound": bound}
    report["place"] = _places(config, before, now)
    differences = []
    if before.numbers is not None and now.numbers is not None:
        for name, old, new in zip(("loss", "grad_norm"), before.numbers, now.numbers, strict=True):
            differences.append(difference(old, new))
            report[name] = {"recorded": old, "replayed": new, "difference": differences[-1]}
    report["gradients"] = _gradients(before.record, now.record)
    if report["gradients"] is not None:
        differences.append(report["gradients"]["largest"] or 0.0)
    report["data"] = _data(before.ledger, now.ledger)
    report["first_difference"] = _first_difference(before.records, now.records)
    report["not_finite"] = {"recorded": not before.is_finite, "replayed": not now.is_finite}
    report["message"] = now.failure
    same = before.is_finite == now.is_finite and report["data"] is not False
    same = same and (not before.failure or bool(now.failure))
    if not same or max(differences, default=0.0) > bound:
        report["result"] = "different"
    else:
        found = report["gradients"]
        equal = not any(differences) and (found is None or found["equal"] == found["all"])
        report["result"] = "equal" if equal else "rounding"
    values: dict[str, Any] = json_values(report)
    return values


def _places(config: JobConfig, before: Known, now: Known) -> dict[str, dict[str, Any]]:
    """Return what may make the bits differ: mesh, device, threads and versions of both."""
    places = {}
    for side, known in (("recorded", before), ("replayed", now)):
        start = known.record.start if known.record is not None else {}
        places[side] = {key: start.get(key) for key in ("mesh", "device", "threads", "versions")}
    places["replayed"]["mesh"] = degrees_of(config)
    return places


def _gradients(before: StepRecord | None, now: StepRecord | None) -> dict[str, Any] | None:
    """Compare the gradients; None if they are not known on both sides."""
    if before is None or now is None:
        return None
    old, new = before.gradients, now.gradients
    both = [name for name in old if name in new]
    apart = {name: old[name].difference(new[name]) for name in both}
    only = sorted(old.keys() ^ new.keys())
    worst = max(apart, key=lambda name: apart[name], default=None)
    return {
        "all": len(old.keys() | new.keys()),
        "equal": sum(old[name].bits == new[name].bits for name in both),
        "name": only[0] if only else worst,
        "largest": math.inf if only else apart.get(worst or "", 0.0),
    }


def _data(before: LedgerStep | None, now: LedgerStep | None) -> bool | None:
    """Return whether the rows are the same; None without a ledger.

    The ledger of a rank that was killed may lack its lanes.
    """
    if before is None or now is None:
        return None
    return all(now.lanes.get(lane) == rows for lane, rows in before.lanes.items())


def _first_difference(
    before: Mapping[int, StepRecord], now: Mapping[int, StepRecord]
) -> dict[str, Any] | None:
    """Return the first replayed step with other bits, and how far it is off."""
    for step in sorted(before.keys() & now.keys()):
        found = _gradients(before[step], now[step])
        if found is not None and found["equal"] < found["all"]:
            return {"step": step, "name": found["name"], "difference": found["largest"]}
    return None


def describe(report: Mapping[str, Any]) -> Iterator[str]:
    """Yield the lines of a report."""
    places = report["place"]
    start = f"step-{report['start']}" if report["start"] else "the beginning"
    yield f"step {report['step']}, replayed from {start} on {_mesh(places['replayed']['mesh'])}"
    for key in ("mesh", "device", "threads", "versions"):
        old, new = places["recorded"][key], places["replayed"][key]
        if old is not None and new is not None and old != new:
            show = _mesh if key == "mesh" else str
            yield f"{key + ':':<11}{show(old)} in the run, {show(new)} here"
    for name in ("loss", "grad_norm"):
        if name in report:
            old, new = (_number(report[name][side]) for side in ("recorded", "replayed"))
            yield f"{name + ':':<11}{old} in the run, {new} here; {_apart(report[name])}"
    yield f"{'gradients:':<11}{_describe_gradients(report['gradients'])}"
    data = {True: "the same rows", False: "other rows", None: "the run has no ledger of them"}
    yield f"{'data:':<11}{data[report['data']]}"
    first = report["first_difference"]
    if first is not None and first["step"] < report["step"]:
        yield f"{'first:':<11}step {first['step']} is the first whose gradients have other bits"
    message = f". {report['message']}" if report["message"] else ""
    yield f"{'result:':<11}{_verdict(report)}{message}"


def _mesh(degrees: Mapping[str, int]) -> str:
    above = [f"{axis} {degree}" for axis, degree in degrees.items() if degree > 1]
    return ", ".join(above) or "one process"


def _number(value: float | None) -> str:
    return "not finite" if value is None else repr(value)


def _apart(entry: Mapping[str, Any]) -> str:
    if entry["difference"] == 0 and entry["recorded"] == entry["replayed"]:
        return "equal" if entry["recorded"] is not None else "both"
    return "different" if entry["difference"] is None else f"relative {entry['difference']:.1e}"


def _describe_gradients(found: Mapping[str, Any] | None) -> str:
    if found is None:
        return "not recorded at this step (debug.record)"
    text = f"{found['equal']} of {plural(found['all'], 'gradient')} equal bit for bit"
    if found["equal"] == found["all"]:
        return text
    largest = "without bound" if found["largest"] is None else f"{found['largest']:.1e}"
    return f"{text}; the largest relative difference is {largest}, of {found['name']}"


def _verdict(report: Mapping[str, Any]) -> str:
    """Return what the comparison means."""
    old, new = (report["not_finite"][side] for side in ("recorded", "replayed"))
    bound = f"rounding explains up to {report['bound']:.1e}"
    if old and not new:
        return (
            "finite now: the first time was changed by a fault of the machine, or by code that"
            " computes something else each time"
        )
    if new:
        again = "not finite again" if old else "not finite, unlike the first time"
        if old and report["result"] == "different":
            again += f", but what is finite is DIFFERENT; {bound}"
        return again
    same = report["place"]["recorded"] == report["place"]["replayed"]
    if report["result"] == "equal":
        return "equal bit for bit" if report["gradients"] else "equal, as far as it is known"
    if report["result"] == "rounding":
        hint = ", though on the same mesh: see debug.deterministic" if same else ""
        return f"equal up to rounding; {bound}{hint}"
    hint = "" if same else "; `torchtitan bisect` names the first tensor that differs"
    return f"DIFFERENT; {bound}{hint}"
