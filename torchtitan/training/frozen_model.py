"""A frozen model that sees each batch before the one in training does, such as DPO's reference.

A loss that needs one has `frozen_pass()`: it returns what the frozen model is evaluated with, which
records what the loss wants to know and adds it to the batches. The frozen model is sharded like the
one in training and evaluated by a runner like its own, so every mesh has it, and on the ranks of a
pipeline or along a sequence the records are where the loss is computed.
"""

import logging
from collections.abc import Callable, Mapping, Sequence
from contextlib import AbstractContextManager, ExitStack
from pathlib import Path
from typing import Protocol

from torch import Tensor
from torch.distributed.device_mesh import DeviceMesh

from torchtitan.checkpoint.digest import weights_digest
from torchtitan.checkpoint.initial_load import InitialLoad
from torchtitan.checkpoint.state import fill_copies, model_tensors
from torchtitan.config import CheckpointError, ConfigError, ConfigIssue, JobConfig
from torchtitan.config.schema import Checkpoint
from torchtitan.distributed.context import DistributedContext
from torchtitan.distributed.parallel_dims import ParallelDims
from torchtitan.loss.registry import DPOSettings, loss_settings
from torchtitan.models.batch import Batch
from torchtitan.parallel.random_streams import RandomStreams
from torchtitan.parallel.runner import Loss, Runner
from torchtitan.training import builder, model_builder
from torchtitan.training.model_builder import BuiltModel
from torchtitan.utils.dtypes import torch_dtype
from torchtitan.weights.hub import download, is_hub_path

logger = logging.getLogger(__name__)

REFERENCE_PATH = "loss.args.reference_path"


class FrozenPass(Loss, Protocol):
    """Records what a loss wants to know from a frozen model, where its loss would be computed."""

    def annotated(self, microbatches: Sequence[Batch]) -> list[Batch]:
        """Return the batches, which were evaluated in this order, with what was recorded."""


class FrozenModelRunner:
    """A `Runner` that first evaluates a frozen model on each batch, for the loss that asks for it.

    `frozen` is the frozen model's runner; it may be `runner` itself, which then computes as the
    frozen model within `context`.
    """

    def __init__(
        self,
        runner: Runner,
        frozen: Runner,
        context: Callable[[], AbstractContextManager[object]] = ExitStack,
    ):
        self._runner = runner
        self._frozen = frozen
        self._context = context

    @property
    def loss(self) -> Loss:
        """See `Runner`."""
        return self._runner.loss

    @property
    def evaluation_loss(self) -> Loss:
        """See `Runner`."""
        return self._runner.evaluation_loss

    @property
    def streams(self) -> RandomStreams:
        """See `Runner`."""
        return self._runner.streams

    @property
    def terms(self) -> Mapping[str, Tensor]:
        """See `Runner`."""
        return self._runner.terms

    def forward_backward(self, microbatches: Sequence[Batch], num_targets: int) -> Tensor:
        """See `Runner`."""
        annotated = self._annotated(microbatches, self.loss)
        return self._runner.forward_backward(annotated, num_targets)

    def evaluate(self, microbatches: Sequence[Batch], loss: Loss | None = None) -> Tensor:
        """See `Runner`."""
        loss = loss or self.evaluation_loss
        return self._runner.evaluate(self._annotated(microbatches, loss), loss)

    def _annotated(self, microbatches: Sequence[Batch], loss: Loss) -> Sequence[Batch]:
        frozen_pass = frozen_pass_of(loss)
        if frozen_pass is None:
            return microbatches
        with self._context():
            self._frozen.evaluate(microbatches, frozen_pass)
        return frozen_pass.annotated(microbatches)


def frozen_pass_of(loss: Loss) -> FrozenPass | None:
    """Return what `loss` wants a frozen model to be evaluated with; None if it needs none."""
    make: Callable[[], FrozenPass | None] = getattr(loss, "frozen_pass", lambda: None)
    return make()


def with_frozen_model(
    config: JobConfig,
    runner: Runner,
    model: BuiltModel,
    vocab_size: int,
    mesh: DeviceMesh,
    dims: ParallelDims,
    world: DistributedContext,
    known_digest: str | None = None,
) -> tuple[Runner, str | None]:
    """Return `runner` with the frozen model that its loss needs, and the digest of its weights.

    All ranks must call it. The digest is None for weights that no file holds. Raises
    CheckpointError if it is not the `known_digest` of the checkpoint that the run starts from.
    """
    if frozen_pass_of(runner.loss) is None:
        return runner, None
    settings = loss_settings(config.loss)
    assert isinstance(settings, DPOSettings)
    if settings.reference == "base":
        return FrozenModelRunner(runner, runner, _without_adapters(model)), known_digest
    path, digest = reference_path(config, settings), None
    if path is not None:
        digest = weights_digest(path, world)
    if known_digest not in (None, digest):
        raise CheckpointError(
            f"the reference of the run was other weights than those of {path}. Set"
            f" {REFERENCE_PATH} to the weights that the run started from"
        )
    frozen = build_frozen_copy(config, path, vocab_size, mesh, dims, world)
    return FrozenModelRunner(
        runner, builder.build_runner(config, frozen, mesh, dims, world.device)
    ), digest


def reference_path(config: JobConfig, settings: DPOSettings) -> Path | None:
    """Return the weights of the frozen copy; None for the initial weights of the seed."""
    path, checkpoint = settings.reference_path, config.checkpoint
    if path is None and checkpoint.enable:
        path = checkpoint.initial_load_path
    if path is None:
        return None
    found = download(path) if is_hub_path(path) else Path(path).resolve()
    if not found.exists():
        text = "does not exist, and the reference is loaded from it at every start of the run"
        fix = f"restore it, or set {REFERENCE_PATH} to a copy"
        raise ConfigError(ConfigIssue(REFERENCE_PATH, text, fix, path))
    return found


def build_frozen_copy(
    config: JobConfig,
    path: Path | None,
    vocab_size: int,
    mesh: DeviceMesh,
    dims: ParallelDims,
    world: DistributedContext,
) -> BuiltModel:
    """Build the model of the config once more, with the weights at `path` or those of the seed.

    It is kept in the type that it computes in, where that is the smaller one: the values are those
    that the model in training would compute with.
    """
    training = config.training
    dtype = min(
        training.dtype, training.mixed_precision_param, key=lambda name: torch_dtype(name).itemsize
    )
    update = {"training": training.model_copy(update={"dtype": dtype})}
    config = config.model_copy(update=update)
    model = model_builder.build_model(
        config, vocab_size, mesh, dims, world.device, initialise=path is None
    )
    if path is not None:
        section = Checkpoint(initial_load_path=str(path), initial_load_model_only=True)
        open_foreign = builder.foreign_opener(config, vocab_size)
        load = InitialLoad(section, world, open_foreign)
        load.load(model_tensors(model.parts), {}, model.handlers)
        fill_copies(model.parts, [])
    model_builder.call_after_load(model)
    for parameter in model.parameters:
        parameter.requires_grad_(False)
    origin = "the initial weights" if path is None else str(path)
    logger.info("The reference is a frozen copy of %s, in %s", origin, dtype)
    return model


def _without_adapters(model: BuiltModel) -> Callable[[], AbstractContextManager[object]]:
    """Return a context in which the model computes without what its handlers add."""

    def context() -> ExitStack:
        with ExitStack() as stack:
            for handler in model.handlers:
                stack.enter_context(handler.without_adapters(model.part_or_parts))
            return stack.pop_all()

    return context
