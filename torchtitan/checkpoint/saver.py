"""`Saver`: when to save and what a checkpoint holds, for the training loop.

Without checkpointing it does nothing, so that the loop need not ask. A checkpoint holds the model,
the optimizer state, and, as JSON in its manifest, where the run stands: step, tokens seen, and the
place of every data lane, whichever rank serves it.
"""

import logging
from collections.abc import Mapping, Sequence
from dataclasses import asdict, dataclass, fields
from typing import Any

import torch
from torch import nn

from torchtitan.checkpoint.checkpointer import Checkpointer, Found
from torchtitan.checkpoint.state import model_tensors, optimizer_tensors
from torchtitan.config import CheckpointError
from torchtitan.config.output_sections import Checkpoint
from torchtitan.distributed.world import World

logger = logging.getLogger(__name__)


@dataclass(frozen=True)
class RunState:
    """Where a run stands after a step."""

    step: int = 0
    num_tokens_seen: int = 0
    lane_states: Mapping[str, dict[str, Any]] | None = None
    """Of all lanes, by number; None at the start of the data."""
    data_fingerprint: str | None = None


class Saver:
    """Saves at intervals and at the end; finds what to resume from. All ranks call every method."""

    def __init__(self, section: Checkpoint, checkpointer: Checkpointer | None, world: World):
        self._section = section
        self._checkpointer = checkpointer
        self._world = world
        self._last_saved = -1
        self._found: Found | None = None
        if checkpointer is not None:
            self._found = checkpointer.find(section.load_step)

    @property
    def resumes(self) -> bool:
        """Whether there is a checkpoint to go on from."""
        return self._found is not None

    @property
    def state(self) -> RunState:
        """Where the run stands in the checkpoint that was found; the start without one."""
        if self._found is None:
            return RunState()
        names = {field.name for field in fields(RunState)}
        return RunState(**{key: value for key, value in self._found.state.items() if key in names})

    def load(
        self, model_parts: Sequence[nn.Module], optimizers: Sequence[torch.optim.Optimizer]
    ) -> None:
        """Load model and optimizer state in place from what was found, if anything was. Raises
        `ConfigError` when there is no room on the disk for the next checkpoint."""
        if self._checkpointer is None:
            return
        tensors = model_tensors(model_parts) | optimizer_tensors(model_parts, optimizers)
        self._checkpointer.require_space(tensors)
        if self._found is None:
            return
        self._checkpointer.load(self._found, tensors)
        self._last_saved = self._found.step
        logger.info("Resumed from step %d (%s).", self._found.step, self._found.path)

    def check_data(self, fingerprint: str) -> None:
        """Refuse to go on with other data than those of the checkpoint, unless that is allowed."""
        stored = self.state.data_fingerprint
        if stored in (None, fingerprint) or self._section.allow_dataset_change:
            return
        raise CheckpointError(
            "the data files, the tokenizer or how the data are cut differ from those of the"
            " checkpoint, so that positions in them have no meaning. Fix: restore them, or start a"
            " run in another job.dump_folder, or set checkpoint.allow_dataset_change"
        )

    def is_due(self, step: int, last: bool) -> bool:
        """Whether `step` is to be saved: each interval, and the `last` one."""
        due = last or step % self._section.interval == 0
        return self._checkpointer is not None and due and step != self._last_saved

    def save(
        self,
        state: RunState,
        lane_states: Mapping[int, dict[str, Any]],
        model_parts: Sequence[nn.Module],
        optimizers: Sequence[torch.optim.Optimizer],
        finished: bool,
    ) -> None:
        """Commit a checkpoint. `lane_states`: those of this rank; `finished`: the run is over."""
        assert self._checkpointer is not None
        lanes: dict[str, dict[str, Any]] = {}
        for part in self._world.gather_json({str(k): v for k, v in lane_states.items()}):
            lanes.update(part)
        model_only = finished and self._section.last_save_model_only
        tensors = model_tensors(model_parts)
        if not model_only:
            tensors |= optimizer_tensors(model_parts, optimizers)
        ordered = dict(sorted(lanes.items(), key=_number))
        whole = asdict(state) | {"lane_states": ordered, "finished": finished}
        self._checkpointer.save(state.step, tensors, whole, model_only=model_only)
        self._last_saved = state.step
        self._world.barrier()  # rank 0 may still be deleting old steps


def _number(item: tuple[str, Any]) -> int:
    return int(item[0])
