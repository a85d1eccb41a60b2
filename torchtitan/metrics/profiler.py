"""Chrome (Perfetto) traces of a few steps out of every `profile_freq`, and GPU memory snapshots.

The profiler waits, runs `profiler_warmup` steps without recording (its start distorts them), then
records `profiler_active` steps. Traces are in `<save_traces_folder>/iteration_N/`, one file a rank;
N is the last step in them. A resumed run traces the same steps.

Memory snapshots, of CUDA only, show which blocks the allocator holds and which Python lines made
them. They are written every `profile_freq` steps to `iteration_N/rankR_memory_snapshot.pickle` in
`<save_memory_snapshot_folder>`, and to `iteration_N_exit` when memory runs out. Drop a file on
https://docs.pytorch.org/memory_viz to see it.
"""

import logging
import warnings
from collections.abc import Callable
from pathlib import Path
from typing import Any

import torch

from torchtitan.config.schema import Profiling

logger = logging.getLogger(__name__)

_MAX_ENTRIES = 100_000
"""Allocations to remember, as in TorchTitan: a few hundred MiB of host memory."""


class Profiler:
    """A context around the loop; `step()` ends each step. Does nothing unless enabled.

    `folder` is the run folder; `start_step` steps were trained before this process started.
    """

    def __init__(
        self,
        section: Profiling,
        folder: Path,
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
        # It warns of keeping one trace at a time, which is intended.
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
        """Count a finished step."""
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
        path = self._folder / f"iteration_{self._step}" / f"rank{self._rank}_trace.json"
        _write("profiler trace", path, profile.export_chrome_trace)


class MemorySnapshots:
    """Records from its creation until `close`. Steps are counted from the start of the run."""

    def __init__(self, folder: Path, freq: int, rank: int):
        self._folder = folder
        self._freq = freq
        self._rank = rank
        torch.cuda.memory._record_memory_history(max_entries=_MAX_ENTRIES)

    def step(self, step: int) -> None:
        """Write a snapshot if one is due after `step`."""
        if step % self._freq == 0:
            self._write(step)

    def close(self, step: int, error: BaseException | None = None) -> None:
        """Stop recording after `step` steps; write a snapshot first if memory ran out."""
        if isinstance(error, torch.OutOfMemoryError):
            self._write(step, "_exit")
        torch.cuda.memory._record_memory_history(enabled=None)

    def _write(self, step: int, suffix: str = "") -> None:
        folder = self._folder / f"iteration_{step}{suffix}"
        path = folder / f"rank{self._rank}_memory_snapshot.pickle"
        _write("memory snapshot", path, torch.cuda.memory._dump_snapshot)


def _write(what: str, path: Path, write: Callable[[str], Any]) -> None:
    """Write a file; a failure is a warning, because no trace is worth a run."""
    try:
        path.parent.mkdir(parents=True, exist_ok=True)
        write(str(path))
    except Exception as error:
        text = "the %s %s cannot be written, training continues: %r"
        logger.warning(text, what, path, error)
    else:
        logger.info("Wrote the %s %s", what, path)
