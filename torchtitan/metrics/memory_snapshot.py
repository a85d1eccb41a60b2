"""Memory snapshots of a GPU: which blocks there are, and which lines of Python made them.

CUDA's allocator keeps a history of what it gives and takes back. It is written every `freq` steps,
to `iteration_N/rankR_memory_snapshot.pickle` in the folder `save_memory_snapshot_folder`, and to
`iteration_N_exit` when memory runs out; https://docs.pytorch.org/memory_viz draws these files.
Other devices have no such history; a config that asks for it there is refused.
"""

import logging
from pathlib import Path

import torch

logger = logging.getLogger(__name__)

_MAX_ENTRIES = 100_000
"""Allocations remembered, as many as TorchTitan's: some hundred MiB of host memory."""


class MemorySnapshots:
    """Records from the moment it is made until `close`. `step` is the run's."""

    def __init__(self, folder: Path, freq: int, rank: int):
        self._folder = folder
        self._freq = freq
        self._rank = rank
        torch.cuda.memory._record_memory_history(max_entries=_MAX_ENTRIES)

    def step(self, step: int) -> None:
        """Step `step` is done."""
        if step % self._freq == 0:
            self._write(f"iteration_{step}")

    def close(self, step: int, error: BaseException | None = None) -> None:
        """Stop recording after `step` steps. If `error` is that memory ran out: write, first."""
        if isinstance(error, torch.OutOfMemoryError):
            self._write(f"iteration_{step}_exit")
        torch.cuda.memory._record_memory_history(enabled=None)

    def _write(self, name: str) -> None:
        path = self._folder / name / f"rank{self._rank}_memory_snapshot.pickle"
        try:
            path.parent.mkdir(parents=True, exist_ok=True)
            torch.cuda.memory._dump_snapshot(str(path))
        except Exception as error:  # a snapshot is never worth a run
            logger.warning("the snapshot %s cannot be written, training goes on: %r", path, error)
            return
        logger.info("Wrote the memory snapshot %s", path)
