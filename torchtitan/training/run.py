"""The training run: `train` is the loop, `run` the life of one process."""

import logging
from collections.abc import Callable, Sequence
from contextlib import ExitStack, closing
from dataclasses import replace

from torchtitan.checkpoint.async_save import is_saving, wait_for_saves
from torchtitan.checkpoint.collective import run_on_rank0
from torchtitan.checkpoint.manager import CheckpointManager
from torchtitan.checkpoint.run_folder import RunFolder
from torchtitan.checkpoint.stored_run import STOP_NAME
from torchtitan.config import JobConfig
from torchtitan.config.exit_codes import DONE, INTERRUPTED
from torchtitan.config.run_context import RunContext
from torchtitan.data.ledger import Ledger
from torchtitan.data.tokenizers import Tokenizer, build_tokenizer
from torchtitan.distributed.context import DistributedContext, open_context, set_timeout, timeout
from torchtitan.distributed.flight_recorder import FlightRecorder
from torchtitan.distributed.parallel_dims import ParallelDims
from torchtitan.metrics.logger import MetricsLogger
from torchtitan.metrics.profiler import Profiler
from torchtitan.optim.lr_scheduler import Schedule, set_learning_rates
from torchtitan.optim.optimizer import build_optimizers
from torchtitan.parallel.grad_clip import clip_gradients
from torchtitan.training import builder, model_builder
from torchtitan.training.description import describe_run
from torchtitan.training.ending import (
    Progress,
    after_error,
    after_success,
    error_of,
    export_last_step,
    finish_uploads,
    leave_now,
    log_folder,
    set_status,
)
from torchtitan.training.evaluation import Evaluator, build_evaluator
from torchtitan.training.frozen_model import build_runner
from torchtitan.training.nonfinite_guard import NonFiniteGuard, build_nonfinite_guard
from torchtitan.training.nonfinite_origin import StepBatch
from torchtitan.training.prefetch import row_counts
from torchtitan.training.recorder import Recorder, build_recorder
from torchtitan.training.same_config import require_same_config
from torchtitan.training.validation import Validator
from torchtitan.utils.device import device_type, set_up_process, use_deterministic_algorithms
from torchtitan.utils.environment import ProcessEnvironment
from torchtitan.utils.garbage import GarbageCollection
from torchtitan.utils.logging import init_logging
from torchtitan.utils.processes import StopRequest

logger = logging.getLogger(__name__)


def train(
    context: RunContext, world: DistributedContext, folder: RunFolder, progress: Progress
) -> None:
    """Train to the end of the steps or of the data, or until asked to stop. All ranks call it.

    `progress` is kept up to date, also for when an exception ends the run.
    """
    config, training, comm = context.config, context.config.training, context.config.comm
    dims = ParallelDims.from_section(context.config.parallelism, context.world_size)
    mesh, stop = dims.build_mesh(world.device.type), progress.stop
    with ExitStack() as stack:
        tokenizer = build_tokenizer(config.model.tokenizer_path)
        manager = stack.enter_context(
            builder.build_manager(config, world, folder, dims, tokenizer, stop.expect_save)
        )
        loader = builder.build_loader(context, dims, world, tokenizer, manager)
        stack.callback(loader.close)
        model = model_builder.build_model(
            config, tokenizer.vocab_size, mesh, dims, world.device, initialise=not manager.loads
        )
        optimizers = build_optimizers(
            config.optimizer, model.parts, world.device, model.parameter_names
        )
        schedule = Schedule(config.lr_scheduler, training.steps)
        builder.load(manager, model, optimizers)
        update = builder.build_update(config, model, optimizers, dims, manager)
        runner, reference = build_runner(
            context, tokenizer, model, mesh, dims, world, manager, stop
        )
        step = first_step = progress.step = progress.first_step = manager.state.step
        progress.saved_step = manager.saved_step
        profiler = Profiler(config.profiling, folder.path, world.rank, world.device, step)
        stack.enter_context(profiler)
        garbage = stack.enter_context(GarbageCollection(training.gc_freq, training.gc_debug))
        guard = build_nonfinite_guard(config, world, model, optimizers, manager, runner, tokenizer)
        ahead = builder.build_prefetch(config, loader, runner.loss, world, stop, dims, manager)
        ledger = stack.enter_context(builder.build_ledger(config, folder, dims, world, manager))
        recorder = build_recorder(config, folder, dims, world, model, manager)
        measurements = (
            builder.build_validator(context, dims, world, tokenizer, runner, stop, garbage),
            build_evaluator(context, dims, world, tokenizer, model, mesh, runner, stop),
        )
        logger.info(describe_run(context, dims, world, model, loader.amount, optimizers))

        def save(finished: bool, last: bool) -> None:
            guard.flush()
            metrics.flush()
            ledger.flush()
            state = builder.run_state(step, trained, metrics, loader, guard, reference)
            # Ranks write different amounts, and rank 0 tidies up: more patience than for a step.
            with timeout(world, comm.init_timeout_seconds, comm.train_timeout_seconds):
                parts, handlers = model.parts, model.handlers
                manager.save(
                    state, trained.lane_states, parts, optimizers, finished, last, handlers
                )

        def report_saved() -> None:
            if progress.saved_step != manager.saved_step:
                progress.saved_step = manager.saved_step
                if world.is_main:
                    set_status(folder, "running", manager.saved_step)

        begin(world, folder, manager, progress, tokenizer, (ledger, recorder))
        metrics = stack.enter_context(builder.build_metrics(config, folder, world, model, loader))
        metrics.resume(manager.state.step, manager.state.num_tokens_seen)
        metrics.start_step()
        with metrics.timing("data"):
            ahead.start()
        while step < training.steps:
            with metrics.timing("data"):
                data, agreed = ahead.wait()
            if agreed.save_failed:
                manager.raise_failure()
            if agreed.ended or agreed.stop:
                progress.status = "preempted" if agreed.stop else "data_exhausted"
                break
            step += 1
            lr = config.optimizer.lr * schedule(step)
            set_learning_rates(optimizers, lr)  # first, as steps may be made in the backward
            runner.streams.step = step
            ledger.record(step, data.data_step, data.spans)
            loss = runner.forward_backward(data.microbatches, agreed.num_targets)
            norm = update.gradient_norm()
            recorder.record(step, loss, norm)
            clip_gradients(model.parameters, norm, training.max_norm)
            batch = StepBatch(step, data.microbatches, agreed.num_targets)
            is_good = guard.record(batch, loss, norm)
            manager.wait_for_staging()
            for handler in model.handlers:
                handler.pre_optimizer_hook(model.part_or_parts)
            update.step(is_good)
            for handler in model.handlers:
                handler.post_optimizer_hook(model.part_or_parts)
            for optimizer in optimizers:
                optimizer.zero_grad()
            if step < training.steps:
                with metrics.timing("data"):  # while the device is still at work
                    ahead.start()
            progress.step, trained = step, data
            metrics.log_step(
                step,
                loss=loss,
                loss_terms=runner.terms,
                grad_norm=norm,
                lr=lr,
                num_targets=agreed.num_targets,
                num_tokens=agreed.num_tokens,
                source_tokens=data.source_tokens,
                counts={**row_counts(agreed), "skipped_steps": guard.num_skipped},
            )
            if step == first_step + 1:  # the first step compiles, allocates, connects
                set_timeout(world, comm.train_timeout_seconds)
            measure(measurements, step, step == training.steps, metrics, guard)
            if manager.is_due(step, last=step == training.steps):
                with metrics.timing("checkpoint"):
                    save(finished=step == training.steps, last=step == training.steps)
            report_saved()
            profiler.step()
            garbage.step(step)

        guard.flush()
        if progress.status == "data_exhausted" and step > first_step:
            measure(measurements, step, True, metrics, guard)
        if step == training.steps:
            progress.status = "completed"
        elif step > first_step and manager.is_due(step, last=True):
            with metrics.timing("checkpoint"):
                save(finished=progress.status == "data_exhausted", last=True)
        with metrics.timing("checkpoint"):
            manager.wait()
        report_saved()


def measure(
    measurements: Sequence[Validator | Evaluator],
    step: int,
    last: bool,
    metrics: MetricsLogger,
    guard: NonFiniteGuard,
) -> None:
    """Take the measurements that are due after `step`; `last`: no step follows."""
    for measurement in measurements:
        if measurement.is_due(step, last):
            guard.flush()
            measurement.run(step, metrics)


def begin(
    world: DistributedContext,
    folder: RunFolder,
    manager: CheckpointManager,
    progress: Progress,
    tokenizer: Tokenizer,
    records: Sequence[Ledger | Recorder],
) -> None:
    """Change the run folder, now that nothing can prevent the start. All ranks call it."""

    def write() -> None:
        folder.begin()
        builder.keep_chat_template(folder.config, folder, tokenizer)
        for record in records:
            record.prepare()

    progress.stop.at_once = False  # from here on the loop ends the run
    run_on_rank0(world, f"the run folder {folder.path} cannot be written", write)
    progress.may_write = True
    manager.begin()
    folder.step_saved()  # the last job may have been killed before it was uploaded


def write_seed(context: RunContext, world: DistributedContext, folder: RunFolder) -> None:
    """Save the initial weights as step 0, for a run on any mesh to start from."""
    config = context.config
    dims = ParallelDims.from_section(context.config.parallelism, context.world_size)
    mesh = dims.build_mesh(world.device.type)
    tokenizer = build_tokenizer(config.model.tokenizer_path)
    manager = builder.build_manager(config, world, folder, dims, tokenizer)
    model = model_builder.build_model(config, tokenizer.vocab_size, mesh, dims, world.device)
    model_builder.initialize_added(model)
    run_on_rank0(world, f"the run folder {folder.path} cannot be written", folder.begin)
    manager.save_seed(model.parts)


def set_up_process_of(
    config: JobConfig, environment: ProcessEnvironment, in_process: bool = False
) -> RunContext:
    """Set up threads, seeds and logging; return the context with the device to use."""
    init_logging(environment.rank, in_process=in_process)
    set_up_process(config.debug.threads, environment, config.debug.seed)
    if config.debug.deterministic:
        use_deterministic_algorithms(config.debug.deterministic_warn_only)
    # The check of the hardware reports "cuda" without a GPU.
    kind = "cuda" if config.job.device == "cuda" else device_type(config.job.device)
    return RunContext(config, environment.world_size, kind)


def run(
    config: JobConfig,
    environment: ProcessEnvironment,
    check_environment: Callable[[RunContext], None],
    check_resolved: Callable[[RunContext, JobConfig], None],
    stop: StopRequest,
    in_process: bool = False,
) -> int:
    """Train as one process of a run, write `run_status.json`, and return the exit status.

    `check_environment` checks devices and model; `check_resolved` the config with the batch size
    and lanes of the stored run. Both raise ConfigError before anything is written. `stop` is
    entered. `in_process`: the process goes on after the run, so errors are raised, once nothing of
    the run is at work any more.
    """
    is_main = environment.rank == 0
    context = set_up_process_of(config, environment, in_process)
    check_environment(context)

    def check(resolved: JobConfig) -> None:
        check_resolved(context, resolved)

    folder = RunFolder.open(config, context, is_main, check)
    progress = Progress(stop=stop)
    # Of one rank, as a thousand would burden the file system.
    stop.watch(folder.path / STOP_NAME if is_main else None, config.training.max_seconds)
    if is_main:  # for a stop before the ranks meet
        progress.step = progress.first_step = folder.decision.step
    with closing(folder):
        return _run_in(folder, config, context, environment, progress, in_process)


def _run_in(
    folder: RunFolder,
    config: JobConfig,
    context: RunContext,
    environment: ProcessEnvironment,
    progress: Progress,
    in_process: bool,
) -> int:
    """Train in a run folder that is open, and return the exit status."""
    is_main = environment.rank == 0
    world: DistributedContext | None = None
    try:
        recorder = FlightRecorder(config.comm, folder.path, environment.rank, context.device_type)
        patience = config.comm.init_timeout_seconds
        with open_context(context.device_type, environment, patience) as world, recorder:
            decision = folder.share(world)
            require_same_config(folder.config, world)
            progress.may_write = not decision.replaces_run
            for notice in decision.notices:
                logger.info(notice)
            if decision.action == "finished":
                log_folder(config, folder, "completed")
                if not is_main:
                    return DONE
                folder.start_uploads()
                return export_last_step(config, folder) or finish_uploads(folder)
            progress.step = progress.first_step = decision.step
            context = replace(context, config=folder.config)
            if config.checkpoint.create_seed_checkpoint:
                write_seed(context, world, folder)
                progress.status = "seeded"
            else:
                world.watch(folder.path, enabled=config.comm.watchdog)
                train(context, world, folder, progress)
    except BaseException as error:
        progress.stop.at_once = False  # the launcher ends all ranks when one does
        failed = after_error(error, environment.rank, world, folder, progress, config.comm)
        if in_process:
            wait_for_saves()
            if world is not None:
                world.watchdog.close()
            finish_uploads(folder)
            raise error_of(failed, error)  # noqa: B904  (error_of has set its cause)
        if failed is None:
            raise
        if failed.code == INTERRUPTED and is_saving():
            leave_now(failed.code)
        if failed.code != INTERRUPTED:
            finish_uploads(folder)
        return failed.code
    code = after_success(config, is_main, folder, progress)
    if is_main and progress.status in ("completed", "data_exhausted"):
        code = export_last_step(config, folder)
    uploaded = finish_uploads(folder)
    return code or uploaded  # a stop stays one: the next start goes on with the upload, too
