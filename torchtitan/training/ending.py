"""The end of a run: its status, its last log lines, and which rank failed first."""

import logging
import os
import re
import shlex
import shutil
import sys
from collections.abc import Iterator
from contextlib import suppress
from dataclasses import dataclass, field, replace
from importlib.util import find_spec
from pathlib import Path
from typing import NoReturn

from torchtitan.checkpoint.manifest import base_of, read_manifest
from torchtitan.checkpoint.run_folder import RunFolder, Status
from torchtitan.checkpoint.stored_run import HF_NAME, TOKENIZER_NAME
from torchtitan.config import (
    CheckpointError,
    ConfigError,
    DataError,
    HangError,
    JobConfig,
    NonFiniteError,
)
from torchtitan.config.exit_codes import (
    CHECKPOINT,
    DATA,
    DONE,
    FAILED,
    HANG,
    INTERRUPTED,
    NON_FINITE,
    OUT_OF_MEMORY,
    PREEMPTED,
    exit_code_of,
)
from torchtitan.config.schema import Comm
from torchtitan.data.chat_template import read_chat_template
from torchtitan.distributed.context import DistributedContext
from torchtitan.distributed.roll_call import Ending, explain
from torchtitan.training.pretrained import newest_step
from torchtitan.utils.processes import StopRequest
from torchtitan.utils.torch_compat import lost_contact

logger = logging.getLogger(__name__)

_EXPLAIN_THEMSELVES = (ConfigError, CheckpointError, DataError, NonFiniteError, HangError)
_LESS_MEMORY = (
    "Fix: a smaller training.local_batch_size or more ranks; docs/guides/memory.md lists what else"
    " saves"
)
_STOPPED_AT_START = "Asked to stop before the first step; the same command starts again."
_GRACE_SECONDS = 2.0
"""Seconds for which a failing rank waits for other ranks' reasons: they lose contact with it."""
_GRACE_AFTER_TIMEOUT_SECONDS = 5.0
"""The same after a timeout of a collective, which ranks do not notice at the same time."""


@dataclass
class Progress:
    """The progress of a run, for its status."""

    step: int = 0
    first_step: int = 0
    """The step that this process starts after."""
    saved_step: int = 0
    status: Status = "running"
    may_write: bool = False
    """This rank knows rank 0's decision, and the folder holds no other run: it may write."""
    stop: StopRequest = field(default_factory=StopRequest)


def after_success(config: JobConfig, is_main: bool, folder: RunFolder, progress: Progress) -> int:
    """Write the final status, log where the results are, and return the exit status."""
    assert progress.status != "running"
    code = PREEMPTED if progress.status == "preempted" else DONE
    if is_main:
        # A time limit that ends before the first step would do so again.
        in_vain = progress.stop.out_of_time and progress.step == progress.first_step
        requeue = code == PREEMPTED and not in_vain
        set_status(folder, progress.status, progress.step, code, requeue=requeue)
    if progress.status == "preempted":
        logger.info(_describe_stop(progress))
    log_folder(config, folder, progress.status)
    return code


def after_error(
    error: BaseException,
    rank: int,
    world: DistributedContext | None,
    folder: RunFolder,
    progress: Progress,
    comm: Comm,
) -> Ending | None:
    """Write the status of a run that failed, or was stopped before its first step, and log why.

    Another rank may know the reason. Return it, with the exit status; None if the caller has to
    report the error. `world` is None if the ranks have not met.
    """
    lost = lost_contact(error)
    code = INTERRUPTED if progress.stop.interrupted else exit_code_of(error)
    # A save that goes on beside training wraps what it waited for in a CheckpointError.
    if lost == "timeout" and code in (FAILED, CHECKPOINT):
        code = HANG
    own = reason = Ending(rank, code, _summary(error, code), lost)
    # A rejected start keeps the status of the stored run.
    writes = progress.may_write if rank else not folder.keeps_status(error)
    if rank == 0 and writes:  # at once: the launcher may not leave time for more
        _set_status_of(own, folder, progress)
    if world is not None and world.roll_call is not None and code != INTERRUPTED:
        seconds = _GRACE_SECONDS
        if lost == "timeout":
            seconds = min(_GRACE_AFTER_TIMEOUT_SECONDS, comm.train_timeout_seconds / 2)
        endings = world.roll_call.end(own, seconds)
        reason = explain(own, endings, world.world_size)
        # Rank 0, or the next one if rank 0 hangs or is gone.
        speaker = rank if endings is None else min(ending.rank for ending in endings)
        if reason.lost and world.watchdog.found_hang():
            report = f". {world.watchdog.report()}" if rank == speaker else ""
            reason = replace(reason, code=HANG, text=f"{reason.text}{report}")
        if rank == speaker and writes:
            _set_status_of(reason, folder, progress)
    if isinstance(error, ConfigError) and progress.step == progress.first_step:
        # Printed with "nothing was started".
        error.known_to_all = True
        return None
    if not isinstance(error, KeyboardInterrupt):
        _log(error, own, reason, progress)
    return reason


def error_of(reason: Ending | None, error: BaseException) -> BaseException:
    """Return what a run raises in Python: `error`, unless the `reason` is another one."""
    if reason is None or exit_code_of(error) == reason.code:
        return error
    kinds = {DATA: DataError, CHECKPOINT: CheckpointError, NON_FINITE: NonFiniteError}
    found = ({HANG: HangError} | kinds).get(reason.code, RuntimeError)(reason.text)
    found.__cause__ = error
    return found


def _set_status_of(ending: Ending, folder: RunFolder, progress: Progress) -> None:
    """Write how the run ended.

    It may go on by itself after a stop, or where ranks were lost, with their machine perhaps. But a
    start that comes to no new checkpoint would be followed by another one like it.
    """
    stopped = ending.code == PREEMPTED
    requeue = stopped or (bool(ending.lost) and progress.saved_step > progress.first_step)
    status: Status = "preempted" if stopped else "failed"
    error = "" if stopped else ending.text
    set_status(folder, status, progress.step, ending.code, error, requeue)


def leave_now(code: int) -> NoReturn:
    """End the process although a thread is writing a checkpoint, which an exit would wait for.

    What the thread has not renamed yet does not exist. The kernel releases the lock of the run
    folder, so the next job starts when this thread is gone.
    """
    logging.shutdown()
    sys.stdout.flush()
    sys.stderr.flush()
    os._exit(code)


def _log(error: BaseException, own: Ending, reason: Ending, progress: Progress) -> None:
    if own.code == INTERRUPTED:
        return
    if reason.code == PREEMPTED:
        logger.info(_STOPPED_AT_START)
    elif reason is not own:
        if reason.lost == "timeout":
            logger.error("This rank waited here:", exc_info=error)
        logger.error("After step %d: %s", progress.step, reason.text)
    elif own.code == OUT_OF_MEMORY:
        logger.error("After step %d: %s", progress.step, own.text)
    else:
        expected = isinstance(error, _EXPLAIN_THEMSELVES)
        logger.error("%s", error, exc_info=None if expected else error)


def _summary(error: BaseException, code: int) -> str:
    """One line, for other ranks."""
    lines = str(error).strip().splitlines() or [""]
    if code == OUT_OF_MEMORY:
        return f"out of memory ({lines[0]}). {_LESS_MEMORY}"
    if lost_contact(error):
        return re.sub(r"^\[\S+\] ", "", lines[0])  # where in gloo's source
    if isinstance(error, _EXPLAIN_THEMSELVES):
        return lines[0]
    return f"{type(error).__name__}: {lines[0]}"


def set_status(
    folder: RunFolder,
    status: Status,
    step: int,
    code: int | None = None,
    error: str = "",
    requeue: bool = False,
) -> None:
    """Write the status; a failure to write is a warning, so that it hides no other error."""
    try:
        folder.set_status(status, step, code, error, requeue)
    except OSError as failure:
        logger.warning("run_status.json could not be written: %s", failure)


def _describe_stop(progress: Progress) -> str:
    """Describe what a run that was asked to stop has saved."""
    if progress.step == progress.first_step:
        return _STOPPED_AT_START
    text = f"Asked to stop after step {progress.step}."
    if progress.saved_step == progress.step:
        return f"{text} It is saved; the same command goes on from it."
    if progress.saved_step:
        return f"{text} The last saved step is {progress.saved_step}."
    return f"{text} Nothing is saved, as checkpoint.enable is false or checkpoint.load_only is set."


def export_last_step(config: JobConfig, folder: RunFolder) -> int:
    """Export the newest step if `checkpoint.last_save_in_hf` is set; return the exit status.

    An export that is there stays. Needs no other rank; nothing of the run is lost if it fails.
    """
    from torchtitan.training import export, open_model

    section, steps = config.checkpoint, folder.path / config.checkpoint.folder
    step = newest_step(steps) if section.last_save_in_hf else None
    if step is None or (folder.path / HF_NAME / step.name).exists():
        return DONE
    dtype = None if section.export_dtype == "float32" else section.export_dtype
    target = folder.path / HF_NAME / step.name
    try:
        target.parent.mkdir(exist_ok=True)
        model = open_model.open_model(step)
        logger.info(export.write_model(model, export.Target(target, dtype=dtype)))
    except (ConfigError, CheckpointError, OSError) as error:
        again = f"torchtitan export {step} OUT"
        logger.error("checkpoint.last_save_in_hf: %s. The run is saved; see `%s`", error, again)
        return CHECKPOINT
    return DONE


def finish_uploads(folder: RunFolder) -> int:
    """Wait for the upload of the last step; return the exit status.

    The status of the run is written by then: a scheduler may kill a job that waits here, and the
    next start goes on with the upload.
    """
    if folder.uploads is None:
        return DONE
    error = folder.uploads.finish()
    if not error:
        return DONE
    text = "The last step is not in checkpoint.remote_folder: %s. It is saved in %s; the same"
    logger.error(f"{text} command uploads it.", error, folder.path)
    return CHECKPOINT


def log_folder(config: JobConfig, folder: RunFolder, status: Status) -> None:
    """Log where the run folder is, and commands that go on from it, on ranks that show it."""
    if not logger.isEnabledFor(logging.INFO):
        return
    commands = list(_next_commands(config, folder.path, status))
    activate = Path(sys.executable).with_name("activate")
    if commands and shutil.which("torchtitan") is None and activate.exists():
        commands.insert(0, (f"source {shlex.quote(str(activate))}", "for the commands below"))
    width = max((len(command) for command, _ in commands), default=0)
    lines = [f"  {command:<{width}}  # {purpose}" for command, purpose in commands]
    unsaved = "" if config.checkpoint.enable else ", without weights (checkpoint.enable = false)"
    header = f"Run folder: {folder.path}{unsaved}{'. What next:' if lines else ''}"
    logger.info("%s", "\n".join([header, *lines]))


def _next_commands(config: JobConfig, path: Path, status: Status) -> Iterator[tuple[str, str]]:
    """Yield commands for a shell, and what each is for."""
    run = shlex.quote(str(path))
    if status != "seeded":
        if config.metrics.enable_tensorboard:
            logs = shlex.quote(str(path / config.metrics.save_tb_folder))
            yield f"tensorboard --logdir {logs}", "curves, config and data in a browser"
        first = "" if find_spec("matplotlib") else ", after pip install matplotlib"
        yield f"torchtitan plot {run}", f"curves as a picture{first}"
    # A run that goes on has no use for them yet.
    if status not in ("completed", "data_exhausted"):
        return
    with suppress(CheckpointError, OSError):  # logged, if the run could not save
        step = newest_step(path / config.checkpoint.folder)
        if step is None:
            return
        modules = ",".join(config.job.custom_import)  # a stored config executes nothing
        custom = f" --job.custom_import={shlex.quote(modules)}" * bool(modules)
        if _has_chat_template(path):
            yield f"torchtitan chat {run}{custom}", "talk with it"
        else:
            yield f"torchtitan generate {run} 'Once upon a time'{custom}", "try the model"
        out = path / f"{HF_NAME}-{step.name}"
        if not config.checkpoint.last_save_in_hf and not out.exists():
            merge = "--merge " * (base_of(read_manifest(step)) is not None)
            export = f"torchtitan export {merge}{run} {shlex.quote(str(out))}{custom}"
            yield export, "for transformers, vLLM and others"


def _has_chat_template(path: Path) -> bool:
    try:
        read_chat_template([path / TOKENIZER_NAME])
    except ConfigError:
        return False
    return True
