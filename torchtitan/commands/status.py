"""`torchtitan status`: where a run stands, from its folder alone. No torch."""

import argparse
import json
import os
import socket
import time
from collections import deque
from collections.abc import Mapping
from pathlib import Path
from typing import Any

from torchtitan.checkpoint.lock import LOCK_NAME
from torchtitan.checkpoint.steps_folder import step_name
from torchtitan.checkpoint.stored_run import METRICS_NAME, STATUS_NAME, StoredRun
from torchtitan.config.errors import ConfigError, ConfigIssue
from torchtitan.config.exit_codes import DONE
from torchtitan.config.paths import expand_path
from torchtitan.utils.text import format_bytes

_RECORDS = 20
"""The rate is a mean over so many of the newest records."""


def run(options: argparse.Namespace) -> int:
    """Print the report."""
    report = status_of(Path(expand_path(options.run)))
    print(json.dumps(report, ensure_ascii=False) if options.json else "\n".join(_lines(report)))
    return DONE


def status_of(folder: Path) -> dict[str, Any]:
    """Return what is known about the run in `folder`, in seconds and Unix times.

    Raises ConfigError if there is no run. Takes no lock, which a start could want at that moment.
    """
    stored = StoredRun(folder, "checkpoint")
    if not stored.is_run:
        issue = ConfigIssue("RUN", "holds no run", "give a job.dump_folder", str(folder))
        raise ConfigError(issue)
    state, holder = stored.status.get("status", "unknown"), _holder(folder)
    if state == "running" and _is_gone(holder):
        state = "killed"
    records = _newest_records(folder / METRICS_NAME)
    step = max([stored.step, *(record["step"] for record in records)])
    newest, steps = stored.newest, stored.planned("training.steps")
    report: dict[str, Any] = {
        "state": state,
        "exit_code": stored.status.get("exit_code"),
        "host": holder.get("host"),
        "pid": holder.get("pid"),
        "step": step,
        "steps": steps,
        "checkpoint": newest.step if newest else None,
        "checkpoint_bytes": newest.num_bytes if newest else None,
        "error": stored.status.get("error") or None,
        "requeue": state == "killed" or bool(stored.status.get("requeue")),
        "last_sign": _last_sign(folder),
    }
    if records:
        seconds = [record["step_seconds"] for record in records]
        report["loss"] = records[-1]["loss"]
        report["step_seconds"] = sum(seconds) / len(seconds)
        report["tokens_per_second"] = records[-1]["tokens_per_second"]
        if state == "running" and steps:
            left = (steps - records[-1]["step"]) * report["step_seconds"]
            report["expected_end"] = (folder / METRICS_NAME).stat().st_mtime + left
    return report


def _lines(report: Mapping[str, Any]) -> list[str]:
    now = time.time()
    state = str(report["state"])
    if report["exit_code"] is not None:
        state += f", exit status {report['exit_code']}"
    elif report["pid"] is not None:
        state += f", process {report['pid']} on {report['host']}"
    lines = {"state": f"{state}; last sign {_duration(now - report['last_sign'])} ago"}
    lines["step"] = f"{report['step']:,}"
    if report["steps"]:
        lines["step"] += f" of {report['steps']:,}"
    if "loss" in report:
        lines["step"] += f", loss {report['loss']:.4f}"
    lines["checkpoint"] = "none"
    if report["checkpoint"] is not None:
        size = format_bytes(report["checkpoint_bytes"])
        lines["checkpoint"] = f"{step_name(report['checkpoint'])} ({size})"
    if "step_seconds" in report:
        tokens = f"{report['tokens_per_second']:,.0f} tokens a second and rank"
        lines["rate"] = f"{report['step_seconds']:.3g} s a step, {tokens}"
    if "expected_end" in report:
        at = time.strftime("%Y-%m-%d %H:%M", time.localtime(report["expected_end"]))
        lines["end"] = f"in {_duration(report['expected_end'] - now)}, at {at}"
    if report["error"]:
        lines["error"] = report["error"]
    if report["requeue"]:
        known = report["checkpoint"] is not None
        what = f"resumes from {step_name(report['checkpoint'])}" if known else "starts it again"
        lines["next"] = f"the same command {what}"
    return [f"{name:<12}{text}" for name, text in lines.items()]


def _holder(folder: Path) -> dict[str, Any]:
    """Return the process that holds the run folder, or held it when it was killed."""
    try:
        holder = json.loads((folder / LOCK_NAME).read_text())
    except (OSError, ValueError):
        return {}
    return holder if isinstance(holder, dict) else {}


def _is_gone(holder: Mapping[str, Any]) -> bool:
    """Return True if the process is known to have ended: on another machine it may be alive."""
    if holder and holder.get("host") != socket.gethostname():
        return False
    try:
        os.kill(int(holder.get("pid", 0)) or 2**31 - 1, 0)
    except PermissionError:
        return False
    except (OSError, ValueError, TypeError, OverflowError):
        return True
    return False


def _newest_records(file: Path) -> list[dict[str, Any]]:
    """Return the newest records of steps, oldest first."""
    records: deque[dict[str, Any]] = deque(maxlen=_RECORDS)
    try:
        lines = file.read_bytes().splitlines()
    except OSError:
        return []
    for line in lines[-10 * _RECORDS :]:  # validation has records, too
        try:
            record = json.loads(line)
        except ValueError:
            continue  # a process may have died while it wrote the last one
        if isinstance(record, dict) and {"loss", "step_seconds"} <= record.keys():
            records.append(record)
    return list(records)


def _last_sign(folder: Path) -> float:
    """Return when the run last wrote its status or a record."""
    files = (folder / STATUS_NAME, folder / METRICS_NAME)
    return max((file.stat().st_mtime for file in files if file.exists()), default=0.0)


def _duration(seconds: float) -> str:
    """Return a duration in its two largest units: `3 h 12 min`."""
    whole = max(0, round(seconds))
    for size, unit, below, smaller in ((86400, "d", 3600, "h"), (3600, "h", 60, "min")):
        if whole >= size:
            return f"{whole // size} {unit} {whole % size // below} {smaller}"
    return f"{whole // 60} min {whole % 60} s" if whole >= 60 else f"{whole} s"
