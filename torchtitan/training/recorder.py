"""Records of steps: loss, gradient norm and a digest of every gradient, for `torchtitan replay`."""

import itertools
import logging
from dataclasses import asdict
from pathlib import Path
from typing import Any

import torch
from torch import Tensor

from torchtitan.checkpoint.manager import CheckpointManager
from torchtitan.checkpoint.run_folder import RunFolder
from torchtitan.checkpoint.stored_run import RECORD_NAME
from torchtitan.config import JobConfig
from torchtitan.config.toml_text import dump_toml
from torchtitan.distributed.context import DistributedContext
from torchtitan.distributed.parallel_dims import ParallelDims
from torchtitan.metrics.sinks import JsonLinesSink
from torchtitan.parallel.gradient_digest import GradientDigests
from torchtitan.training.model_builder import BuiltModel
from torchtitan.training.step_record import start_line, step_line

logger = logging.getLogger(__name__)


class Recorder:
    """Writes `record.jsonl` of a run, every so many steps. All ranks call `record`."""

    def __init__(
        self,
        every: int,
        path: Path,
        after: int,
        start: dict[str, Any],
        digests: GradientDigests | None,
        is_main: bool,
    ):
        """Go on after the step `after`, by a `start` of the run; without `digests` do nothing."""
        self._every, self._digests = every, digests
        self._path, self._after, self._start = path, after, start
        self._writes = is_main

    def prepare(self) -> None:
        """Let what earlier starts wrote for later steps not count any more. Raises OSError.

        For rank 0, before the first step.
        """
        if self._digests is None and not self._path.exists():
            return
        sink = JsonLinesSink(self._path)
        sink.resume(self._after)
        if self._digests is not None:
            sink.write(start_line(self._after, self._start))
        sink.close()

    def record(self, step: int, loss: Tensor, norm: Tensor) -> None:
        """Note a step whose gradients are reduced, and not clipped yet; the scalars are its.

        A failure to write is reported, and ends the record, not the run.
        """
        if self._digests is None or step % self._every:
            return
        gradients = self._digests.take()
        if not self._writes:
            return
        try:
            sink = JsonLinesSink(self._path)
            sink.write(step_line(step, float(loss), float(norm), gradients))
            sink.flush()
            sink.close()
        except OSError as error:
            self._writes = False
            logger.warning("the record %s ends, training continues: %r", self._path, error)


def build_recorder(
    config: JobConfig,
    folder: RunFolder,
    dims: ParallelDims,
    world: DistributedContext,
    model: BuiltModel,
    manager: CheckpointManager,
) -> Recorder:
    """Build what records steps; all ranks call it."""
    digests = None
    if config.debug.record:
        named = itertools.chain.from_iterable(part.named_parameters() for part in model.parts)
        digests = GradientDigests(world, named, model.parameter_names)
    on_gpu = world.device.type == "cuda"
    info = folder.run_info(
        mesh=asdict(dims),
        device=torch.cuda.get_device_name(world.device) if on_gpu else world.device.type,
        threads=torch.get_num_threads(),
    )
    info["config"] = dump_toml(config)  # JSON has no infinity, which max_norm may be
    path, after = folder.path / RECORD_NAME, manager.state.step
    return Recorder(config.debug.record, path, after, info, digests, world.is_main)
