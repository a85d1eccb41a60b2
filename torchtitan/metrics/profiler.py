"""Profiler: Chrome (Perfetto) traces of a few steps out of every `profile_freq`.

The profiler waits, then runs `profiler_warmup` steps without recording (its start distorts them),
then records `profiler_active` steps. Traces lie in `<save_traces_folder>/iteration_N/`, one file a
rank, N being the last step in it. The steps are the run's: a resumed run traces the same ones.
Memory snapshots keep the same rhythm; see `memory_snapshot.py`.
"""

import logging
import warnings
from pathlib import Path
from typing import Any

import torch

from torchtitan.config.schema import Profiling
from torchtitan.metrics.memory_snapshot import MemorySnapshots

logger = logging.getLogger(__name__)


class Profiler:
    """A context around the loop; `step()` ends each step. Does nothing unless profiling or memory
    snapshots are enabled; these need CUDA.

    `folder`: the run folder. `start_step`: steps trained before this process started.
    """

    def __init__(
        self,
        section: Profiling,
        folder: Path,
        *,
        rank: int,
        device: torch.device,
        start_step: int = 0,
    ):
        self._folder = folder / section.save_traces_folder
        self._rank = rank
        self._step = start_step
        self._ended = False
        self._profile: Any = None
        self._snapshots: MemorySnapshots | None = None
        if section.enable_memory_snapshot:
            snapshots = folder / section.save_memory_snapshot_folder
            self._snapshots = MemorySnapshots(snapshots, section.profile_freq, rank)
        if not section.enable_profiling:
            return
        length = section.profiler_warmup + section.profiler_active
        schedule = torch.profiler.schedule(
            wait=section.profile_freq - length,
            warmup=section.profiler_warmup,
            active=section.profiler_active,
        )
        activities = [torch.profiler.ProfilerActivity.CPU]
        if device.type == "cuda":
            activities.append(torch.profiler.ProfilerActivity.CUDA)
        # One trace at a time is what we want, and what this warns of.
        warnings.filterwarnings("ignore", message=".*Profiler clears events")
        self._profile = torch.profiler.profile(
            activities=activities,
            # Counted from the start of the run, so that a resume does not shift the traced steps.
            schedule=lambda step: schedule(start_step + step),
            on_trace_ready=self._write,
            record_shapes=True,
        )

    def __enter__(self) -> "Profiler":
        if self._profile is not None:
            self._profile.__enter__()
        return self

    def step(self) -> None:
        """A step is done."""
        self._step += 1
        if self._profile is not None:
            self._profile.step()
        if self._snapshots is not None:
            self._snapshots.step(self._step)

    def __exit__(self, *details: Any) -> None:
        self._ended = True
        if self._snapshots is not None:
            self._snapshots.close(self._step, details[1])
        if self._profile is not None:
            self._profile.__exit__(*details)

    def _write(self, profile: Any) -> None:
        if self._ended:  # the run's end cut this one off, perhaps before its first step
            return
        folder = self._folder / f"iteration_{self._step}"
        path = folder / f"rank{self._rank}_trace.json"
        try:
            folder.mkdir(parents=True, exist_ok=True)
            profile.export_chrome_trace(str(path))
        except Exception as error:  # a trace is never worth a run
            logger.warning("the trace %s cannot be written, training goes on: %r", path, error)
            return
        logger.info("Wrote the profiler trace %s", path)
