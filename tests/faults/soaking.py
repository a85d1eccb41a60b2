"""A run that is killed again and again, and what must hold whenever its processes are gone."""

import contextlib
import json
import random
import re
import signal
import time
from collections import Counter
from collections.abc import Sequence
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any

import torch
import torch.distributed.checkpoint as dcp

from tests.faults.saving import digest
from tests.faults.starting import CONFIG, KEPT, MESHES, Start
from torchtitan.checkpoint.dcp_io import SafeReader
from torchtitan.checkpoint.manifest import InvalidCheckpoint, Manifest, verify_share
from torchtitan.checkpoint.steps_folder import inspect_steps, step_name
from torchtitan.data.ledger import read_ledger

SITES = {
    **dict.fromkeys(("load.verify", "load.read", "start.begin", "step", "ckpt.begin"), False),
    **dict.fromkeys(("ckpt.shard_written", "ckpt.hashed", "ckpt.after_commit"), False),
    **dict.fromkeys(("folder.begin", "ckpt.manifest", "ckpt.rename"), True),
    **dict.fromkeys(("purge.begin", "purge.half"), True),
}
"""The sites where a rank kills itself (`probe.py`); True: only rank 0 gets there."""
ACTIONS = ("kill all", "kill one", "stop and kill", "term", "term one", "term and kill")
GRACE_SECONDS = 120.0
"""Ranks may go on so long after one has failed, on a busy machine; torchrun gives them 30."""
LAUNCHER_SECONDS = 30.0
"""From torchrun's SIGTERM to its SIGKILL."""
PATIENCE_SECONDS = 300.0
"""For a start to get to where it is to be killed, on a busy machine."""


@dataclass
class Figures:
    """The sums over all runs."""

    kills: Counter[str] = field(default_factory=Counter)
    faults: list[str] = field(default_factory=list)
    commits: int = 0
    runs: int = 0
    compared: int = 0
    """Steps on the disk whose content was compared with what ranks had when they saved it."""
    repeated: list[int] = field(default_factory=list)
    """For each kill, the steps that have to be trained again."""
    lonely_seconds: list[float] = field(default_factory=list)
    """Seconds that a training rank went on after its peer was killed."""
    stop_seconds: list[float] = field(default_factory=list)
    """From SIGTERM to the end of all ranks."""


class Soaked:
    """A run in a folder of its own; `meshes` are those that its starts choose from."""

    def __init__(
        self,
        place: Path,
        steps: int,
        meshes: Sequence[str],
        dtype: str,
        dice: random.Random,
        figures: Figures,
    ):
        self.folder, self.notes, self.config = place / "run", place / "notes", place / "config.toml"
        self.notes.mkdir(parents=True)
        self.config.write_text(CONFIG.replace("DTYPE", dtype).replace("STEPS", str(steps)))
        self.starts, self._last = 0, steps
        self._meshes, self._dice, self._figures = meshes, dice, figures
        self._start_seconds = 3.0
        self._known: dict[int, str] = {}
        self._newest = self._acks = 0

    @property
    def is_over(self) -> bool:
        return self.status().get("status") == "completed"

    def status(self) -> dict[str, Any]:
        path = self.folder / "run_status.json"
        return json.loads(path.read_text()) if path.exists() else {}

    def finish(self, mesh: str) -> None:
        """Train to the end, with nothing in the way."""
        start = Start(self, mesh, ())
        start.ends(PATIENCE_SECONDS, len(start.ranks))
        codes = start.close()
        if any(codes) or not self.is_over:
            self.fault(f"a start that nothing happened to ended with {codes}:\n{start.text()}")
        self._check(start, mesh)

    def fault(self, text: str) -> None:
        self._figures.faults.append(f"{self.folder}, start {self.starts}: {text}")

    # --- one start ------------------------------------------------------------------------------

    def kill_once(self) -> str:
        """Start, do something to the ranks, check; return a line on it. Nothing if it was late."""
        dice = self._dice
        mesh = dice.choice(self._meshes)
        count = MESHES[mesh][0]
        mode = dice.choice(("disabled", "async", "async_with_pinned_mem"))
        arguments = [
            f"--checkpoint.async_mode={mode}",
            f"--checkpoint.interval={dice.choice('12')}",
        ]
        if dice.random() < 0.15:
            arguments.append("--training.dataloader.num_workers=1")
        kind = dice.choice(("site", "site", "time", "step", "step"))
        fault = ""
        if kind == "site":
            action, only_first = dice.choice(list(SITES.items()))
            victim = 0 if only_first else dice.randrange(count)
            nth = 1 if action.startswith(("load", "folder", "start")) else dice.randint(1, 4)
            fault = f"{action}:{victim}:{nth}"
        else:
            action = dice.choice(ACTIONS)
        started = time.monotonic()
        start = Start(self, mesh, arguments, fault)
        try:
            happened = self._do(start, kind, action, started)
        finally:
            codes = start.close()
        if happened:
            self._figures.kills[action] += 1
            self._check_end(start, action, codes)
        elif any(codes):
            self.fault(f"a start that nothing happened to ended with {codes}:\n{start.text()}")
        self._check(start, mesh)
        self.starts += 1
        what = (
            f"{mesh}, {mode}: {action} at {kind}" if happened else f"{mesh}: over before {action}"
        )
        return f"{what}, step {self.status().get('step', 0)}, newest {self._newest}, exit {codes}"

    def _do(self, start: Start, kind: str, action: str, started: float) -> bool:
        """Do what was chosen; return whether all ranks were still there to do it to."""
        if kind == "site":
            start.ends(PATIENCE_SECONDS, 1)
            happened = -signal.SIGKILL in start.codes
            if happened:
                self._end_survivors(start)
            start.ends(GRACE_SECONDS, len(start.ranks))
            return happened
        if kind == "time":
            start.ends(self._dice.uniform(0, 1.5 * self._start_seconds), 1)
        else:
            self._wait_for_step(start, self._dice.randint(1, 6), started)
        if len(start.living) < len(start.ranks):
            start.ends(GRACE_SECONDS, len(start.ranks))
            return False
        one = [self._dice.choice(start.ranks)]
        if action == "kill all":
            start.send(signal.SIGKILL, start.ranks)
        elif action == "kill one":
            start.send(signal.SIGKILL, one)
            start.ends(GRACE_SECONDS, 1)
            self._end_survivors(start)
        elif action == "stop and kill":
            start.send(signal.SIGSTOP, one)
            time.sleep(self._dice.uniform(0, 0.5))
            start.send(signal.SIGKILL, start.ranks)
        elif action == "term and kill":
            start.send(signal.SIGTERM, start.ranks)
            start.ends(self._dice.uniform(0, 0.5), len(start.ranks))
            start.send(signal.SIGKILL, start.ranks)
        else:
            self._stop(start, one if action == "term one" else start.ranks)
        return True

    def _wait_for_step(self, start: Start, step: int, started: float) -> None:
        while start.steps < step and not start.ends(0.005, 1):
            if start.steps < 1:
                self._start_seconds = time.monotonic() - started
            if time.monotonic() > started + PATIENCE_SECONDS:
                self.fault(f"no step {step} in time:\n{start.text()}")
                return
        time.sleep(self._dice.uniform(0, 0.1))

    def _stop(self, start: Start, ranks: Sequence[Any]) -> None:
        """Ask ranks to stop. One that leaves before they meet leaves the others to a launcher."""
        sent = time.monotonic()
        start.send(signal.SIGTERM, ranks)
        start.ends(PATIENCE_SECONDS, 1)
        if not start.steps:
            self._end_survivors(start)
        elif not start.ends(PATIENCE_SECONDS, len(start.ranks)):
            self.fault(f"ranks did not end after SIGTERM:\n{start.text()}")
        elif start.steps:
            self._figures.stop_seconds.append(time.monotonic() - sent)

    def _end_survivors(self, start: Start) -> None:
        """Let ranks that train end by themselves; others as a launcher does.

        That is SIGTERM, which a rank that waits for others to meet sees late, and SIGKILL.
        """
        since = time.monotonic()
        if not start.steps:
            start.send(signal.SIGTERM, start.ranks)
            if not start.ends(LAUNCHER_SECONDS, len(start.ranks)):
                start.send(signal.SIGKILL, start.ranks)
                start.ends(GRACE_SECONDS, len(start.ranks))
        elif not start.ends(GRACE_SECONDS, len(start.ranks)):
            self.fault(f"ranks outlived a killed one:\n{start.text()}")
        elif len(start.ranks) > 1:
            self._figures.lonely_seconds.append(time.monotonic() - since)

    # --- what must hold -------------------------------------------------------------------------

    def _check_end(self, start: Start, action: str, codes: list[int]) -> None:
        """Compare exit statuses with the status that the run wrote."""
        status = self.status()
        if self.is_over:
            if status["step"] != self._last:
                self.fault(f"over at {status}")
            return
        # A rank may have come to its end while the first one was killed before it said so.
        if 0 in codes and (not any(codes) or self._last not in self._valid()):
            self.fault(f"exit 0 and {status}:\n{start.text()}")
        if action not in ("term", "term one") or not start.steps:
            return
        if set(codes) != {7} or status["status"] != "preempted":
            self.fault(f"{action} ended with {codes} and {status}:\n{start.text()}")
        elif status["step"] not in self._valid():
            self.fault(f"{action}: step {status['step']} is not saved:\n{start.text()}")

    def _valid(self) -> dict[int, Manifest]:
        """The committed steps. One that a kill has damaged is a fault."""
        found = {}
        for candidate in inspect_steps(self.folder / "checkpoint"):
            if candidate.manifest is None:
                self.fault(f"damaged by a kill: {candidate.fault}")
            else:
                found[candidate.step] = candidate.manifest
        return found

    def _check(self, start: Start, mesh: str) -> None:
        """Look at the folder as the next start will find it."""
        valid, text = self._valid(), start.text()
        acks = [path.name.split(".")[1:] for path in self.notes.glob("ack.*")]
        acknowledged = {int(step): int(number) for step, number in acks}
        newest = max(valid, default=0)
        if newest < max(acknowledged, default=0):
            self.fault(f"committed {max(acknowledged)}, but there are {sorted(valid)}:\n{text}")
        if len(valid) < min(KEPT, len(acknowledged)):
            self.fault(f"only {sorted(valid)} of {sorted(acknowledged)} are left:\n{text}")
        for resumed in re.findall(r"Resumed from step (\d+)", text)[:1]:
            if int(resumed) != self._newest:
                self.fault(f"resumed from {resumed}, the newest was {self._newest}:\n{text}")
        for step, manifest in valid.items():
            if self._known.get(step) != str(manifest.files):
                self._known[step] = str(manifest.files)
                self._compare(step, manifest, acknowledged.get(step))
        for path in (self.folder / "checkpoint").glob("quarantine-*"):
            self.fault(f"{path.name}:\n{text}")
        if start.steps and not self.is_over:
            self._figures.repeated.append(max(start.steps + self._newest - newest, 0))
        self._newest, self._figures.commits = newest, self._figures.commits + len(acks) - self._acks
        self._acks = len(acks)
        left = leftover_processes(self.notes)
        if left:
            self.fault(f"processes outlived their ranks: {left}")

    def _compare(self, step: int, manifest: Manifest, start: int | None) -> None:
        """Compare each part of a step with what its rank had; of any start, if none reported it."""
        path = self.folder / "checkpoint" / step_name(step)
        try:
            verify_share(path, manifest, 0, 1)
        except InvalidCheckpoint as error:
            self.fault(f"damaged by a kill: {error}")
            return
        tensors = read_step(path, manifest)
        pattern = f"parts.{step}.{'*' if start is None else start}.*"
        by_start: dict[str, list[Path]] = {}
        for note in self.notes.glob(pattern):
            by_start.setdefault(note.name.split(".")[2], []).append(note)
        if not any(self._fits(tensors, notes) for notes in by_start.values()):
            self.fault(f"the content of step {step} is not what was saved")
        self._figures.compared += 1

    def _fits(self, tensors: dict[str, torch.Tensor], notes: Sequence[Path]) -> bool:
        covered: Counter[str] = Counter()
        for note in notes:
            for name, (expected, *places) in json.loads(note.read_text()).items():
                part = tensors[name][tuple(slice(*place) for place in places)]
                if digest(part.contiguous()) != expected:
                    return False
                covered[name] += part.numel()
        return all(covered[name] >= tensor.numel() for name, tensor in tensors.items())

    # --- the end of the run ---------------------------------------------------------------------

    def compare_with(self, quiet: "Soaked", tolerance: float) -> None:
        """Compare the finished run with one that nothing happened to."""
        mine, theirs = (run._last_step() for run in (self, quiet))
        for name, tensor in theirs.items():
            difference = (tensor - mine[name]).abs().max() / tensor.abs().max().clamp(min=1e-300)
            if not difference <= tolerance:
                self.fault(f"{name} of the last step differs by {difference:.1e}")
        for row, expected in zip(self._rows(), quiet._rows(), strict=True):
            for key in ("step", "num_targets", "num_tokens_seen", "loss", "grad_norm"):
                if not abs(row[key] - expected[key]) <= tolerance * abs(expected[key]):
                    self.fault(f"{key}: {row[key]} in {row}, expected {expected[key]}")
        if read_ledger(self.folder) != read_ledger(quiet.folder):
            self.fault("the ledger is another one")
        names = {path.name for path in self.folder.iterdir()} - {"comm_traces"}
        strays = names - {path.name for path in quiet.folder.iterdir()}
        steps = {path.name for path in (self.folder / "checkpoint").iterdir()}
        strays |= {name for name in steps if not re.fullmatch(r"step-\d+", name)}
        if strays:
            self.fault(f"left over: {sorted(strays)}")

    def _last_step(self) -> dict[str, torch.Tensor]:
        return read_step(
            self.folder / "checkpoint" / step_name(self._last), self._valid()[self._last]
        )

    def _rows(self) -> list[dict[str, Any]]:
        lines = (self.folder / "metrics.jsonl").read_text().splitlines()
        return [json.loads(line) for line in lines]


def leftover_processes(notes: Path, patience_seconds: float = PATIENCE_SECONDS) -> list[str]:
    """Return the programs, started by ranks, that still run: reading processes of the data."""
    deadline = time.monotonic() + patience_seconds
    mark = f"PROBE_NOTES={notes}\0".encode()
    while True:
        found = []
        for environ in Path("/proc").glob("[0-9]*/environ"):
            with contextlib.suppress(OSError):
                if mark in environ.read_bytes():
                    found.append(environ.with_name("cmdline").read_text().replace("\0", " "))
        if not found or time.monotonic() > deadline:
            return found
        time.sleep(0.05)


def read_step(path: Path, manifest: Manifest) -> dict[str, torch.Tensor]:
    """Return the whole tensors of a step."""
    tensors = {
        name: torch.empty(entry["shape"], dtype=getattr(torch, entry["dtype"]))
        for name, entry in manifest.tensors.items()
    }
    dcp.load(tensors, storage_reader=SafeReader(path), no_dist=True)
    return tensors
