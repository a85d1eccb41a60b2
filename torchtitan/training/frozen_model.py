"""A frozen model that sees each batch before the one in training: DPO's reference, or a teacher.

A loss that needs one has `frozen_pass()`: it returns what the frozen model is evaluated with, which
records what the loss wants to know and adds it to the batches. The frozen model is sharded like the
one in training and evaluated by a runner like its own, so every mesh has it, and on the ranks of a
pipeline or along a sequence the records are where the loss is computed.
"""

import logging
from collections.abc import Callable, Mapping, Sequence
from contextlib import AbstractContextManager, ExitStack
from functools import partial
from pathlib import Path

from torch import Tensor
from torch.distributed.device_mesh import DeviceMesh

from torchtitan.checkpoint.base import digest_of_files, weights_digest
from torchtitan.checkpoint.config_diff import stored_value
from torchtitan.checkpoint.initial_load import InitialLoad
from torchtitan.checkpoint.manager import CheckpointManager
from torchtitan.checkpoint.manifest import read_manifest
from torchtitan.checkpoint.state import fill_copies, model_tensors
from torchtitan.config import CheckpointError, ConfigError, ConfigIssue, JobConfig
from torchtitan.config.run_context import RunContext
from torchtitan.config.schema import Checkpoint, Model, Parallelism
from torchtitan.data.tokenizers import Tokenizer
from torchtitan.distributed.context import DistributedContext
from torchtitan.distributed.parallel_dims import ParallelDims
from torchtitan.handlers.named import NamedHandler
from torchtitan.loss.reference_cache import CachedLogProbs
from torchtitan.loss.registry import DistillationSettings, DPOSettings, loss_settings
from torchtitan.models.batch import Batch
from torchtitan.models.family import FROM_CHECKPOINT
from torchtitan.models.registry import get_family
from torchtitan.parallel.runner import Loss, Runner, frozen_pass_of
from torchtitan.training import builder, model_builder
from torchtitan.training.model_builder import BuiltModel
from torchtitan.training.reference_pass import (
    PairSet,
    cached_log_probs,
    reference_facts,
    sets_of_run,
)
from torchtitan.training.tensor_recorder import TensorRecorder, record_backward
from torchtitan.utils.dtypes import torch_dtype
from torchtitan.utils.processes import StopRequest
from torchtitan.utils.remote import is_remote
from torchtitan.weights.description import describe_model
from torchtitan.weights.remote import download

logger = logging.getLogger(__name__)

REFERENCE_PATH = "loss.args.reference_path"
TEACHER_PATH = "loss.args.teacher_path"
INITIAL_WEIGHTS = "initial weights"
"""In place of the digest of files."""


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
        self.loss = runner.loss
        self.evaluation_loss = runner.evaluation_loss
        self.streams = runner.streams
        self.terms: Mapping[str, Tensor] = {}
        self.evaluated_terms: Mapping[str, Tensor] = {}

    def forward_backward(self, microbatches: Sequence[Batch], num_targets: int) -> Tensor:
        """See `Runner`."""
        annotated = self.annotated(microbatches, self.loss)
        loss = self._runner.forward_backward(annotated, num_targets)
        self.terms = self._runner.terms
        return loss

    def evaluate(self, microbatches: Sequence[Batch], loss: Loss | None = None) -> Tensor:
        """See `Runner`."""
        loss = loss or self.evaluation_loss
        total = self._runner.evaluate(self.annotated(microbatches, loss), loss)
        self.evaluated_terms = self._runner.evaluated_terms
        return total

    def annotated(self, microbatches: Sequence[Batch], loss: Loss) -> Sequence[Batch]:
        """Return the batches with what `loss` wants to know of the frozen model. Collective."""
        frozen_pass = frozen_pass_of(loss)
        if frozen_pass is None:
            return microbatches
        with self._context():
            self._frozen.evaluate(microbatches, frozen_pass)
        return frozen_pass.annotated(microbatches)


class CachedReferenceRunner(FrozenModelRunner):
    """A `Runner` that adds what a frozen model said of the same pairs before the first step."""

    def __init__(self, runner: Runner, cached: CachedLogProbs):
        super().__init__(runner, runner)
        self._cached = cached

    def annotated(self, microbatches: Sequence[Batch], loss: Loss) -> Sequence[Batch]:
        """See `FrozenModelRunner`. Raises DataError for pairs that were not in the data then."""
        if frozen_pass_of(loss) is None:
            return microbatches
        return [self._cached.annotated(batch) for batch in microbatches]


def build_runner(
    context: RunContext,
    tokenizer: Tokenizer,
    model: BuiltModel,
    mesh: DeviceMesh,
    dims: ParallelDims,
    world: DistributedContext,
    manager: CheckpointManager,
    stop: StopRequest,
) -> tuple[Runner, str | None]:
    """Return the runner of a run, and what `with_frozen_model` says of the frozen model."""
    config, size = context.config, tokenizer.vocab_size
    runner = builder.build_runner(config, model, mesh, dims, world.device)
    known = manager.state.reference_digest

    def sets() -> list[PairSet]:
        return sets_of_run(context, dims, world, tokenizer, runner.loss, stop)

    runner, digest = with_frozen_model(config, runner, model, size, mesh, dims, world, known, sets)
    if config.debug.record_tensors is not None:
        recorder = TensorRecorder(config.debug.record_tensors, "backward", dims)
        record_backward(recorder, model, runner, config.training.steps)
    return runner, digest


def with_frozen_model(
    config: JobConfig,
    runner: Runner,
    model: BuiltModel,
    vocab_size: int,
    mesh: DeviceMesh,
    dims: ParallelDims,
    world: DistributedContext,
    known_digest: str | None = None,
    sets: Callable[[], Sequence[PairSet]] = tuple,
) -> tuple[Runner, str | None]:
    """Return `runner` with the frozen model that its loss needs, and the digest of its weights.

    All ranks must call it. `sets` are the data that a reference is computed for in advance. The
    digest is None without a frozen model of its own. Raises CheckpointError if it is not the
    `known_digest` of the checkpoint that the run starts from.
    """
    if frozen_pass_of(runner.loss) is None:
        return runner, None
    settings = loss_settings(config.loss)
    is_teacher = isinstance(settings, DistillationSettings)
    is_base = not is_teacher and settings.reference == "base"
    cache: str | None = None if is_teacher else settings.reference_cache
    if is_base and cache is None:
        return FrozenModelRunner(runner, runner, _without_adapters(model)), known_digest
    key, given = _weights_of(config, settings)
    path = found_path(key, given) if given else None
    # A frozen copy has what a handler starts from; the base and a teacher do not.
    handlers = [] if is_base or is_teacher else model.handlers
    files = [file for handler in handlers for file in handler.start_files]
    digest = _digest(path, files, world)
    if not is_base and known_digest not in (None, digest):
        places = ", ".join(map(str, [path or INITIAL_WEIGHTS, *files]))
        raise CheckpointError(
            f"the run compared with other weights than those of {places}. Set {key} to those"
        )

    def frozen() -> FrozenModelRunner:
        if is_base:
            return FrozenModelRunner(runner, runner, _without_adapters(model))
        other = config
        if is_teacher:
            assert path is not None
            other = teacher_config(config, path, vocab_size)
        built = build_frozen_model(other, path, vocab_size, mesh, dims, world)
        return FrozenModelRunner(
            runner, builder.build_runner(other, built, mesh, dims, world.device)
        )

    digest_to_keep = known_digest if is_base else digest
    if cache is None:
        return frozen(), digest_to_keep
    # A seed gives other weights on other devices.
    drawn = (config.debug.seed, world.device.type) if path is None else None
    facts = reference_facts(config, model, [digest, is_base, drawn])
    cached = cached_log_probs(
        sets(), facts, Path(cache), lambda: partial(frozen().annotated, loss=runner.loss), world
    )
    return CachedReferenceRunner(runner, cached), digest_to_keep


def _digest(path: Path | None, files: Sequence[Path], world: DistributedContext) -> str:
    """Return what identifies the weights at `path`, or those of the seed, and `files` with them."""
    digest = INITIAL_WEIGHTS if path is None else weights_digest(path, world)
    if files:
        digest += "+" + digest_of_files(world, f"{files[0]} cannot be read", files)
    return digest


def _weights_of(
    config: JobConfig, settings: DistillationSettings | DPOSettings
) -> tuple[str, str | None]:
    """Return the key that names the frozen model's weights, and their path; None: the seed's."""
    if isinstance(settings, DistillationSettings):
        return TEACHER_PATH, settings.teacher_path
    start = _start_of(config.checkpoint) if config.checkpoint.enable else None
    return REFERENCE_PATH, settings.reference_path or start


def _start_of(section: Checkpoint) -> str | None:
    """Return the path of the weights that a run started from; None: the seed's.

    One that goes on from a step of another run has the start of that one.
    """
    path, model_only = section.initial_load_path, section.initial_load_model_only
    while path is not None and not model_only:
        stored = read_manifest(Path(path).resolve()).info.get("config") or {}
        path = stored_value(stored, "checkpoint.initial_load_path")
        model_only = stored_value(stored, "checkpoint.initial_load_model_only") is not False
    return path


def config_of_copy(config: JobConfig, vocab_size: int) -> JobConfig | None:
    """Return the config of the frozen model that the loss needs a place for; None if it needs none.

    Reads a teacher's description, not its weights. Raises ConfigError without the teacher.
    """
    settings = loss_settings(config.loss)
    if isinstance(settings, DistillationSettings):
        assert settings.teacher_path is not None
        path = found_path(TEACHER_PATH, settings.teacher_path, with_weights=False)
        return _held(teacher_config(config, path, vocab_size))
    if isinstance(settings, DPOSettings) and settings.needs_reference:
        # The pass over the data in advance needs less than a step.
        is_held = settings.reference != "base" and settings.reference_cache is None
        return _held(config) if is_held else None
    return None


def found_path(key: str, given: str, with_weights: bool = True) -> Path:
    """Return the folder or file of weights that `given` names, downloaded if it is remote."""
    path = download(given, with_weights=with_weights) if is_remote(given) else Path(given)
    path = path.resolve()
    if not path.exists():
        text = "does not exist, and these weights are loaded at every start of the run"
        raise ConfigError(ConfigIssue(key, text, f"restore them, or set {key} to a copy", given))
    return path


def teacher_config(config: JobConfig, path: Path, vocab_size: int) -> JobConfig:
    """Return the config with the model at `path` in place of its own, without handlers.

    Raises ConfigError for another vocabulary.
    """
    description = describe_model(path)
    args = dict(description.args)
    norm = args.pop("norm_type", None) or Model().norm_type
    section = Model(
        name=description.family,
        flavor=FROM_CHECKPOINT,
        norm_type=norm,
        args=args,
        tokenizer_path=config.model.tokenizer_path,
    )
    own = get_family(config.model.name).resolve(config.model, vocab_size).vocab_size
    theirs = get_family(section.name).resolve(section, vocab_size).vocab_size
    if own != theirs:
        text = f"has a vocabulary of {theirs} tokens, and the model of {own}"
        fix = "choose a teacher with the same tokenizer"
        raise ConfigError(ConfigIssue(TEACHER_PATH, text, fix, str(path)))
    defaults = Parallelism()
    names = (
        "module_fqns_per_model_part",
        "pipeline_parallel_layers_per_stage",
        "pipeline_parallel_first_stage_less_layers",
        "pipeline_parallel_last_stage_less_layers",
    )
    update = {name: getattr(defaults, name) for name in names}  # those are of the model's layers
    parallelism = config.parallelism.model_copy(update=update)
    return config.model_copy(update={"model": section, "parallelism": parallelism})


def build_frozen_model(
    config: JobConfig,
    path: Path | None,
    vocab_size: int,
    mesh: DeviceMesh,
    dims: ParallelDims,
    world: DistributedContext,
) -> BuiltModel:
    """Build the model of the config, frozen, with the weights at `path` or those of the seed."""
    config = _held(config)
    model = model_builder.build_model(
        config, vocab_size, mesh, dims, world.device, initialise=path is None
    )
    loaded: list[NamedHandler] = []
    if path is not None:
        section = Checkpoint(initial_load_path=str(path), initial_load_model_only=True)
        open_foreign = builder.foreign_opener(config, vocab_size)
        load = InitialLoad(section, world, open_foreign)
        load.load(model_tensors(model.parts), {}, model.handlers)
        fill_copies(model.parts, [])
        loaded = [handler for handler in model.handlers if load.holds_any(handler.added)]
    model_builder.initialize_added(model, without=loaded)
    model_builder.call_after_load(model)
    for parameter in model.parameters:
        parameter.requires_grad_(False)
    origin = "the initial weights" if path is None else str(path)
    dtype = config.training.dtype
    logger.info("The loss compares with a frozen model, in %s: %s", dtype, origin)
    return model


def _held(config: JobConfig) -> JobConfig:
    """Return the config in the type that a frozen model is kept in.

    That is the one it computes in, where that is smaller: the values are those that the model in
    training would compute with.
    """
    training = config.training
    dtype = min(
        training.dtype, training.mixed_precision_param, key=lambda name: torch_dtype(name).itemsize
    )
    return config.model_copy(update={"training": training.model_copy(update={"dtype": dtype})})


def _without_adapters(model: BuiltModel) -> Callable[[], AbstractContextManager[object]]:
    """Return a context in which the model computes without what its handlers add."""

    def context() -> ExitStack:
        with ExitStack() as stack:
            for handler in model.handlers:
                stack.enter_context(handler.without_adapters(model.part_or_parts))
            return stack.pop_all()

    return context
