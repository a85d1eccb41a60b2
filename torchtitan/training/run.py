"""The training run: `train` is the loop, `run` one process of a run from config to exit status."""

import logging
from collections.abc import Callable
from contextlib import ExitStack
from dataclasses import replace

import torch

from torchtitan.checkpoint.agreement import run_on_rank0
from torchtitan.checkpoint.async_save import is_saving
from torchtitan.checkpoint.manager import CheckpointManager, RunState
from torchtitan.checkpoint.run_folder import RunFolder
from torchtitan.config import JobConfig
from torchtitan.config.exit_codes import DONE, INTERRUPTED
from torchtitan.config.run_context import RunContext
from torchtitan.data.tokenizers import build_tokenizer
from torchtitan.distributed.context import DistributedContext, open_context, set_timeout, timeout
from torchtitan.distributed.flight_recorder import FlightRecorder
from torchtitan.distributed.parallel_dims import ParallelDims
from torchtitan.metrics.logger import MetricsLogger
from torchtitan.optim.lr_scheduler import Schedule, set_learning_rates
from torchtitan.parallel.grad_clip import clip_gradients
from torchtitan.training import builder, model_builder
from torchtitan.training.ending import (
    Progress,
    after_error,
    after_success,
    closing_words,
    leave_now,
    set_status,
)
from torchtitan.training.prefetch import Prefetch
from torchtitan.utils.device import device_type
from torchtitan.utils.environment import ProcessEnvironment
from torchtitan.utils.garbage import GarbageCollection
from torchtitan.utils.logging import init_logging
from torchtitan.utils.process import set_up_process, use_deterministic_algorithms

logger = logging.getLogger(__name__)


def train(
    context: RunContext, world: DistributedContext, folder: RunFolder, progress: Progress
) -> None:
    """Train to the end of the steps or of the data, or until asked to stop. All ranks call it.

    `progress` tells how far it came, also when an exception ends it.
    """
    config, training = context.config, context.config.training
    dims = ParallelDims.from_context(context)
    mesh = dims.build_mesh(world.device.type)
    with ExitStack() as stack:
        tokenizer = build_tokenizer(config.model.tokenizer_path)
        saver = stack.enter_context(builder.build_saver(config, world, folder, dims))
        loader = builder.build_loader(context, dims, world, tokenizer, saver)
        stack.callback(loader.close)
        model = model_builder.build_model(
            config, tokenizer.vocab_size, mesh, dims, world.device, initialise=not saver.loads
        )
        optimizers = builder.build_optimizers(config, model, world.device)
        schedule = Schedule(config.lr_scheduler, training.steps)
        builder.load(saver, model, optimizers)
        update = builder.build_update(config, model, optimizers, dims, saver)
        runner = builder.build_runner(config, model, mesh, dims, world.device)
        metrics = stack.enter_context(builder.build_metrics(config, folder, world, model))
        step = first_step = progress.step = saver.state.step
        progress.saved_step = saver.saved_step
        profiler = stack.enter_context(builder.build_profiler(config, folder, world, step))
        garbage = stack.enter_context(GarbageCollection(training.gc_freq, training.gc_debug))
        stop = stack.enter_context(progress.stop)
        nonfinite_guard = builder.build_nonfinite_guard(config, world, model, optimizers, saver)
        ahead = Prefetch(
            loader,
            runner.loss,
            world,
            stop,
            dims.is_data_leader(world.rank),
            saver.save_failed,
            config.data.max_bad_rows,
        )
        validator = builder.build_validator(
            context, dims, world, tokenizer, runner, metrics, stop, garbage
        )
        logger.info(builder.describe(context, dims, world, model))

        def save(finished: bool, last: bool) -> None:
            nonfinite_guard.flush()
            metrics.flush()
            seen, summary = metrics.num_tokens_seen, loader.data_summary
            state = RunState(step, seen, None, loader.fingerprint, summary)
            # Ranks write different amounts, and rank 0 tidies up: more patience than for a step.
            with timeout(
                world, config.comm.init_timeout_seconds, config.comm.train_timeout_seconds
            ):
                parts, handlers = model.parts, model.handlers
                saver.save(state, lanes, parts, optimizers, finished, last, handlers)

        def tell_saved() -> None:
            if progress.saved_step != saver.saved_step:
                progress.saved_step = saver.saved_step
                if world.is_main:
                    set_status(folder, "running", saver.saved_step)

        begin(world, folder, saver, metrics)
        metrics.start_step()
        with metrics.timing("data"):
            ahead.start()
        while step < training.steps:
            with metrics.timing("data"):
                data, agreed = ahead.wait()
            if agreed.save_failed:
                saver.raise_failure()
            if agreed.ended or agreed.stop:
                progress.status = "preempted" if agreed.stop else "data_exhausted"
                break
            step += 1
            lr = config.optimizer.lr * schedule(step)
            set_learning_rates(optimizers, lr)  # first, as steps may be made in the backward
            runner.streams.step = step
            loss = runner.forward_backward(data.microbatches, agreed.num_targets)
            norm = update.gradient_norm()
            clip_gradients(model.parameters, norm, training.max_norm)
            saver.wait_for_staging()
            for handler in model.handlers:
                handler.pre_optimizer_hook(model.part_or_parts)
            # Beside the parameters; where these are on the host, this waits for the loss.
            is_finite = torch.isfinite(norm) & torch.isfinite(loss.to(norm.device))
            update.step(is_finite)
            for handler in model.handlers:
                handler.post_optimizer_hook(model.part_or_parts)
            for optimizer in optimizers:
                optimizer.zero_grad()
            if step < training.steps:
                with metrics.timing("data"):  # while the device is still at work
                    ahead.start()
            nonfinite_guard.record(step, is_finite)
            progress.step, lanes = step, data.lane_states
            metrics.log_step(
                step,
                loss=loss,
                loss_terms=runner.terms,
                grad_norm=norm,
                lr=lr,
                num_targets=agreed.num_targets,
                num_tokens=agreed.num_tokens,
                source_tokens=data.source_tokens,
                bad_rows=agreed.bad_rows,
            )
            if step == first_step + 1:  # the first step compiles, allocates, connects
                set_timeout(world, config.comm.train_timeout_seconds)
            if validator.is_due(step, last=step == training.steps):
                nonfinite_guard.flush()
                validator.run(step)
            if saver.is_due(step, last=step == training.steps):
                with metrics.timing("checkpoint"):
                    save(finished=step == training.steps, last=step == training.steps)
            tell_saved()
            profiler.step()
            garbage.step(step)

        nonfinite_guard.flush()
        ended_early = progress.status == "data_exhausted" and step > first_step
        if ended_early and validator.is_due(step, last=True):
            validator.run(step)
        if step == training.steps:
            progress.status = "completed"
        elif step > first_step and saver.is_due(step, last=True):
            with metrics.timing("checkpoint"):
                save(finished=progress.status == "data_exhausted", last=True)
        with metrics.timing("checkpoint"):
            saver.wait()
        tell_saved()


def begin(
    world: DistributedContext, folder: RunFolder, saver: CheckpointManager, metrics: MetricsLogger
) -> None:
    """Change the run folder, now that nothing can refuse the start any more. All ranks call it."""
    run_on_rank0(world, f"the run folder {folder.path} cannot be written", folder.begin)
    saver.begin()
    metrics.resume(saver.state.step, saver.state.num_tokens_seen)


def write_seed(context: RunContext, world: DistributedContext, folder: RunFolder) -> None:
    """Save the initial weights as step 0, for a run on any mesh to start from."""
    config = context.config
    dims = ParallelDims.from_context(context)
    mesh = dims.build_mesh(world.device.type)
    vocab_size = build_tokenizer(config.model.tokenizer_path).vocab_size
    saver = builder.build_saver(config, world, folder, dims)
    model = model_builder.build_model(config, vocab_size, mesh, dims, world.device)
    run_on_rank0(world, f"the run folder {folder.path} cannot be written", folder.begin)
    saver.save_seed(model.parts)


def set_up_process_of(config: JobConfig, environment: ProcessEnvironment) -> RunContext:
    """Prepare this process for training; return the context on the device that it will use."""
    init_logging(environment.rank)
    set_up_process(config.debug.threads, environment, config.debug.seed)
    if config.debug.deterministic:
        use_deterministic_algorithms(config.debug.deterministic_warn_only)
    # "cuda" without a GPU is left to the check of the hardware.
    kind = "cuda" if config.job.device == "cuda" else device_type(config.job.device)
    return RunContext(config, environment.world_size, kind)


def run(
    config: JobConfig,
    environment: ProcessEnvironment,
    check_environment: Callable[[RunContext], None],
    check_resolved: Callable[[RunContext, JobConfig], None],
) -> int:
    """Train as one process of the run that the launcher's variables describe; the exit status.

    `check_environment` looks at the devices and the model; `check_resolved` at the config with the
    batch size and lanes of the stored run. Both raise ConfigError, before anything is written. How
    the run ended is in `run_status.json`.
    """
    is_main = environment.rank == 0
    context = set_up_process_of(config, environment)
    check_environment(context)

    def check(resolved: JobConfig) -> None:
        check_resolved(context, resolved)

    folder = RunFolder.open(config, context, is_main, check)
    progress = Progress()
    world: DistributedContext | None = None
    try:
        recorder = FlightRecorder(config.comm, folder.path, environment.rank, context.device_type)
        patience = config.comm.init_timeout_seconds
        with open_context(context.device_type, environment, patience) as world, recorder:
            decision = folder.share(world)
            progress.is_shared = True
            for notice in decision.notices:
                logger.info(notice)
            if decision.action == "finished":
                logger.info(closing_words(config, folder))
                return DONE
            progress.step = progress.first_step = decision.step
            context = replace(context, config=folder.config)
            if config.checkpoint.create_seed_checkpoint:
                write_seed(context, world, folder)
                progress.status = "seeded"
            else:
                train(context, world, folder, progress)
    except BaseException as error:
        patience = config.comm.train_timeout_seconds
        failed = after_error(error, environment.rank, world, folder, progress, patience)
        if failed is None:
            raise
        if failed == INTERRUPTED and is_saving():
            leave_now(failed)
        return failed
    finally:
        folder.close()
    return after_success(config, is_main, folder, progress)
