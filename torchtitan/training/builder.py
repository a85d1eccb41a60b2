"""The composition root: builds each object of a run from its section and the objects it uses.

Below this module, only handlers see a whole `JobConfig`.
"""

import logging
from collections.abc import Callable, Sequence
from dataclasses import asdict
from functools import partial
from pathlib import Path
from typing import Any

import torch
from torch.distributed.device_mesh import DeviceMesh

from torchtitan.checkpoint.manager import CheckpointManager
from torchtitan.checkpoint.manifest import RunState
from torchtitan.checkpoint.run_folder import RunFolder
from torchtitan.checkpoint.store import CheckpointStore
from torchtitan.checkpoint.stored_run import TOKENIZER_NAME
from torchtitan.config import DataError, JobConfig
from torchtitan.config.run_context import RunContext
from torchtitan.data import loader as data_loader
from torchtitan.data.chat_template import TEMPLATE_NAME
from torchtitan.data.chat_templates import find_chat_template
from torchtitan.data.identity import differences
from torchtitan.data.ledger import Ledger
from torchtitan.data.loader import LanePlan, Loader, StepData
from torchtitan.data.named_sources import named_sources, validation_sets
from torchtitan.data.tokenizers import Tokenizer
from torchtitan.data.validation_reader import Pass, SetReader, build_reader
from torchtitan.distributed.context import DistributedContext
from torchtitan.distributed.parallel_dims import ParallelDims
from torchtitan.loss.cross_entropy import build_losses
from torchtitan.loss.vocab_parallel import VocabShard
from torchtitan.metrics.logger import MeasuredRun, MetricsLogger
from torchtitan.metrics.rank_times import RankTimes
from torchtitan.metrics.sinks import Sink, SinkRun, sink_opener
from torchtitan.metrics.wandb_sink import WandbSink
from torchtitan.models.registry import get_family
from torchtitan.optim.update import AfterBackward, OptimizerInBackward, Update
from torchtitan.parallel.context.context_parallel import ContextParallel
from torchtitan.parallel.pipeline.runner import HiddenStates, LocalStages, PipelineRunner
from torchtitan.parallel.random_streams import RandomStreams
from torchtitan.parallel.runner import Loss, Runner, SPMDRunner
from torchtitan.training.description import texts_of_run
from torchtitan.training.model_builder import BuiltModel, call_after_load, initialize_added
from torchtitan.training.nonfinite_guard import NonFiniteGuard
from torchtitan.training.prefetch import Prefetch
from torchtitan.training.tensor_recorder import TensorRecorder, record_update
from torchtitan.training.validation import Validator
from torchtitan.utils.dtypes import torch_dtype
from torchtitan.utils.environment import read_wandb
from torchtitan.utils.files import write_atomically
from torchtitan.utils.garbage import GarbageCollection
from torchtitan.utils.host import seconds_since_start
from torchtitan.utils.processes import StopRequest
from torchtitan.weights.source import WeightSource, open_weights

logger = logging.getLogger(__name__)


def load(
    manager: CheckpointManager, model: BuiltModel, optimizers: Sequence[torch.optim.Optimizer]
) -> None:
    """Load the start of the run; handlers see the weights before they get their state."""
    manager.load(model.parts, optimizers, model.handlers)
    loaded = [handler for handler in model.handlers if manager.has_loaded_added(handler)]
    initialize_added(model, without=loaded)
    for handler in (handler for handler in loaded if handler.added):
        text = "What %s adds is in the checkpoint, so any other start of it has no effect."
        logger.info(text, handler.name)
    call_after_load(model)
    manager.load_handlers(model.handlers, model.parts, optimizers)


def build_update(
    config: JobConfig,
    model: BuiltModel,
    optimizers: Sequence[torch.optim.Optimizer],
    dims: ParallelDims,
    manager: CheckpointManager | None = None,
) -> Update:
    """Build what steps the parameters. `manager` may still be copying them before a step."""
    update: Update
    if config.optimizer.early_step_in_backward:
        wait_for_staging = manager.wait_for_staging if manager is not None else lambda: None
        update = OptimizerInBackward(
            optimizers,
            dims.ranks_per_stage,
            wait_for_staging,
            model.parameters[0],
            late=[copy for weight in model.tied for copy in weight.parameters],
            uncounted=model.uncounted,
        )
    else:
        update = AfterBackward(model.parameters, optimizers, dims.ranks_per_stage, model.uncounted)
    if config.debug.record_tensors is not None and manager is not None:
        recorder = TensorRecorder(config.debug.record_tensors, "update", dims)
        record_update(recorder, model, update, config.training.steps - manager.state.step)
    return update


def build_runner(
    config: JobConfig, model: BuiltModel, mesh: DeviceMesh, dims: ParallelDims, device: torch.device
) -> Runner:
    """Build what computes the losses and gradients of a step."""
    names = ["tokens", "positions"] + ["document_ids"] * config.training.document_mask
    shard = vocab_shard(config, model, mesh, dims)
    section = config.parallelism
    shard_batch = sequence_group = None
    if dims.cp > 1:
        sequence_group = mesh["cp"].get_group()
        shard_batch = ContextParallel.from_section(section, mesh["cp"]).shard_batch
    loss, evaluation_loss = build_losses(
        config.loss, config.training.loss_chunks, shard, sequence_group
    )
    streams = RandomStreams(
        config.debug.seed,
        device,
        num_lanes=RunContext(config, dims.world_size, device.type).num_lanes,
        dp_degree=dims.dp,
        dp_rank=dims.dp_rank(mesh.get_rank()),
        part=(mesh.get_local_rank("cp"), mesh.get_local_rank("tp")),
    )
    common: dict[str, Any] = {
        "evaluation_loss": evaluation_loss,
        "shard_batch": shard_batch,
        "is_loss_leader": dims.is_loss_leader(mesh.get_rank()),
        "streams": streams,
    }
    if model.plan is None:
        return SPMDRunner(model.parts[0], loss, device, names, **common)
    dtype = torch_dtype(config.training.mixed_precision_param)
    hidden = HiddenStates(model.args.hidden_size(), dtype, dims.tp)
    group = mesh["pp"].get_group()
    local = LocalStages(model.parts, model.plan, group, hidden, section, model.tied)
    return PipelineRunner(local, loss, device, names, **common)


def vocab_shard(
    config: JobConfig, model: BuiltModel, mesh: DeviceMesh, dims: ParallelDims
) -> VocabShard | None:
    """Return this rank's part of the vocabulary; None without tensor parallelism."""
    if dims.tp == 1:
        return None
    total, group = model.args.vocab_size, mesh["tp"].get_group()
    assert total is not None
    return VocabShard(total, group, config.parallelism.disable_loss_parallel)


def build_loader(
    context: RunContext,
    dims: ParallelDims,
    world: DistributedContext,
    tokenizer: Tokenizer,
    manager: CheckpointManager,
) -> Loader:
    """Build this rank's share of the data, at the position of the checkpoint."""
    config = context.config
    plan = LanePlan(
        num_lanes=context.num_lanes,
        dp_degree=dims.dp,
        dp_rank=dims.dp_rank(world.rank),
        global_batch_size=context.global_batch_size,
        local_batch_size=config.training.local_batch_size,
    )
    stored = manager.state
    loader = data_loader.build_loader(
        config.training,
        config.data,
        config.debug.seed,
        tokenizer,
        plan,
        stored.lane_states,
        stored.data_fingerprint,
        stored.step if stored.data_step is None else stored.data_step,
    )
    if len(set(world.gather_json(loader.fingerprint))) > 1:
        loader.close()
        raise DataError(
            "the ranks see different data files or tokenizers; every machine must see the same"
            " training.dataset_path and model.tokenizer_path"
        )
    if not loader.names_data(stored.data_fingerprint):
        compare = partial(differences, now=loader.data_summary, anew=config.data.restart)
        manager.check_data(loader.fingerprint, compare)
        if loader.change and world.is_main:
            logger.warning("%s", loader.change)
    return loader


def build_ledger(
    config: JobConfig,
    folder: RunFolder,
    dims: ParallelDims,
    world: DistributedContext,
    manager: CheckpointManager,
) -> Ledger:
    """Build what notes the rows of each step, on one of the ranks that read the same data."""
    writes = config.data.ledger and dims.is_data_leader(world.rank)
    return Ledger(folder.path, manager.state.step, world.rank, writes)


def build_prefetch(
    config: JobConfig,
    loader: Loader,
    loss: Loss,
    world: DistributedContext,
    stop: StopRequest,
    dims: ParallelDims,
    manager: CheckpointManager,
) -> Prefetch:
    """Build what reads a step ahead."""
    is_data_leader = dims.is_data_leader(world.rank)
    most, failed = config.data.max_bad_rows, manager.save_failed
    return Prefetch(loader, loss, world, stop, is_data_leader, failed, most)


def run_state(
    step: int,
    data: StepData,
    metrics: MetricsLogger,
    loader: Loader,
    guard: NonFiniteGuard,
    reference: str | None,
) -> RunState:
    """Return the state to save after `step`, which trained on `data`; lanes are added later."""
    return RunState(
        step,
        metrics.num_tokens_seen,
        data_fingerprint=loader.fingerprint,
        data_summary=loader.data_summary,
        reference_digest=reference,
        skipped_steps=guard.num_skipped,
        recent_losses=guard.recent_losses,
        data_step=data.data_step,
    )


def keep_chat_template(config: JobConfig, folder: RunFolder, tokenizer: Tokenizer) -> None:
    """Write the template of chat data to the run's copy of the tokenizer, for chat and export.

    Raises OSError.
    """
    target = folder.path / TOKENIZER_NAME
    formats = {named.data.format for named in named_sources(config.training, config.data)}
    if formats != {"text"} and target.is_dir():
        template = find_chat_template(config.data.chat_template, tokenizer)
        write_atomically(target / TEMPLATE_NAME, template.source)


def build_validator(
    context: RunContext,
    dims: ParallelDims,
    world: DistributedContext,
    tokenizer: Tokenizer,
    runner: Runner,
    stop: StopRequest,
    garbage: GarbageCollection,
) -> Validator:
    """Build the validation; without a set it is never due."""
    config, section = context.config, context.config.validation
    readers = build_validation_readers(context, dims, world, tokenizer)
    if len(world.gather_distinct_json([reader.fingerprint for reader in readers])) > 1:
        raise DataError("the ranks see different validation files; every machine must see the same")
    is_data_leader = dims.is_data_leader(world.rank)

    def fetch_ahead(steps: Pass) -> Prefetch:
        return Prefetch(steps, runner.evaluation_loss, world, stop, is_data_leader)

    return Validator(section, config.comm, readers, fetch_ahead, runner, world, garbage)


def build_validation_readers(
    context: RunContext, dims: ParallelDims, world: DistributedContext, tokenizer: Tokenizer
) -> list[SetReader]:
    """Build the readers of this rank's shares of the validation sets."""
    section = context.config.validation
    return [
        build_reader(
            named,
            tokenizer,
            num_lanes=section.lanes,
            max_sequences=None if section.steps < 0 else section.steps * context.global_batch_size,
            dp_degree=dims.dp,
            dp_rank=dims.dp_rank(world.rank),
        )
        for named in validation_sets(context.config)
    ]


def build_manager(
    config: JobConfig,
    world: DistributedContext,
    folder: RunFolder,
    dims: ParallelDims,
    tokenizer: Tokenizer,
    on_saved: Callable[[float], None] = lambda seconds: None,
) -> CheckpointManager:
    """Build checkpointing; without `checkpoint.enable` it does nothing."""
    store = None

    def saved(seconds: float) -> None:
        on_saved(seconds)
        folder.step_saved()

    if config.checkpoint.enable:
        run_info = folder.run_info(mesh=asdict(dims), world_size=world.world_size)
        store = CheckpointStore(
            config.checkpoint,
            folder.checkpoint_folder,
            world,
            run_info,
            save_timeout_seconds=config.comm.init_timeout_seconds,
            on_saved=saved,
            uploading=lambda: folder.uploads.uploading if folder.uploads else -1,
        )
    open_foreign = foreign_opener(config, tokenizer.vocab_size)
    replaces_run = folder.decision.replaces_run
    return CheckpointManager(config.checkpoint, store, world, replaces_run, open_foreign)


def foreign_opener(config: JobConfig, vocab_size: int) -> Callable[[Path], WeightSource]:
    """Return what opens weights of other programs for the model of the config."""
    family = get_family(config.model.name)
    return partial(
        open_weights,
        family=family,
        args=family.resolve(config.model, vocab_size),
        pads_vocabulary="vocab_size" in config.model.args,
    )


def build_metrics(
    config: JobConfig,
    folder: RunFolder,
    world: DistributedContext,
    model: BuiltModel,
    loader: Loader,
) -> MetricsLogger:
    """Open the metrics of the run; call `resume` before the first step."""
    more_sinks: dict[str, Callable[[], Sink]] = {}
    rank = world.rank if config.metrics.save_for_all_ranks else None
    run = SinkRun(folder.path, folder.decision.run_id, config.model_dump(mode="json"), rank)
    if config.metrics.enable_wandb:
        description = config.job.description
        more_sinks[WandbSink.name] = lambda: WandbSink(run, read_wandb(), description)
    for name in config.metrics.sinks:
        more_sinks[name] = sink_opener(config.sinks, name, run)
    measured = MeasuredRun(
        folder.path,
        world.rank,
        world.world_size,
        world.device,
        config.training.steps,
        model.flops_per_token,
        model.flops_per_token_causal,
        seconds_before=seconds_since_start(),
    )
    ranks = RankTimes(world, config.metrics.slow_rank_ratio)
    texts = partial(texts_of_run, config, loader, folder.decision.step == 0)
    return MetricsLogger(config.metrics, measured, more_sinks, ranks=ranks, texts=texts)
