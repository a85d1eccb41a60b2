"""Weights & Biases: the records of a run as one run there, under the tags that TensorBoard has.

wandb is used as its users know it: its variables, its login, its offline mode. What it cannot do
never stops a run. Without a login or a network, records are kept in the run folder in wandb's own
format, and `wandb sync` uploads them later. The id of the run there is that of the run folder, so a
resume goes on with it.

Records pass through a process of wandb's own, and wandb waits for its answers without a limit. So a
process that does not answer in time is killed here, and every wait for it ends with an error.

The x-axis is the step of each record (`step`), not wandb's count of calls: that one cannot go back,
and a resume does. Steps that are trained again after a resume appear there twice.
"""

import logging
import threading
from collections.abc import Iterator, Mapping
from contextlib import contextmanager, suppress
from pathlib import Path
from subprocess import Popen
from typing import Any

from torchtitan.metrics.sinks import Record, tagged
from torchtitan.utils.environment import WandbEnvironment
from torchtitan.utils.redaction import redact_tree

logger = logging.getLogger(__name__)

DEFAULT_PROJECT = "torchtitan"
_MODES_WITHOUT_LOGIN = ("offline", "dryrun", "disabled")
_INIT_TIMEOUT_SECONDS = 60.0
_FINISH_TIMEOUT_SECONDS = 20.0
"""For uploads at the end; a launcher that was told to stop kills the run after 30."""
_ANSWER_TIMEOUT_SECONDS = 30.0
"""Beyond what wandb may take; other ranks wait meanwhile, by default for 100."""


class WandbSink:
    """A run of wandb's, started at once. `folder`: the run folder; `run_id`: its id; `config` is
    uploaded without secrets. `rank` is None unless every rank has a run: then they form a group."""

    name = "Weights & Biases"
    keeps_trying = False

    def __init__(
        self,
        folder: Path,
        run_id: str,
        config: Mapping[str, Any],
        environment: WandbEnvironment,
        description: str = "",
        rank: int | None = None,
    ):
        suffix = "" if rank is None else f"-rank{rank}"
        name = environment.name or folder.name
        self._run = _start(
            environment.mode,
            dir=str(folder),
            id=(environment.run_id or run_id) + suffix,
            resume="allow",
            project=environment.project or DEFAULT_PROJECT,
            entity=environment.entity,
            name=name + suffix,
            group=environment.group or (name if rank is not None else None),
            job_type=environment.job_type,
            tags=list(environment.tags) or None,
            notes=environment.notes or description or None,
            config=redact_tree(config),
        )
        self._run.define_metric("step")
        self._run.define_metric("*", step_metric="step")

    def resume(self, step: int) -> None:
        """What is there stays: wandb does not forget."""

    def write(self, record: Record) -> None:
        with _answers_within(_ANSWER_TIMEOUT_SECONDS):
            self._run.log({"step": record["step"], **tagged(record)})

    def flush(self) -> None:
        """Nothing to do: a process of wandb's writes what it was sent, also if this one dies."""

    def close(self, failed: bool = False) -> None:
        with _answers_within(_FINISH_TIMEOUT_SECONDS + _ANSWER_TIMEOUT_SECONDS):
            try:
                self._run.finish(exit_code=1 if failed else 0)
            finally:  # now, and not when Python ends, when nobody looks at the time
                _end_process()


@contextmanager
def _answers_within(seconds: float) -> Iterator[None]:
    """While entered, wandb's process is killed if it takes longer. Whoever waits for it fails."""
    process = _process()
    timer = threading.Timer(seconds, _kill, [process, seconds])
    timer.daemon = True
    timer.start()
    try:
        yield
    finally:
        timer.cancel()


def _process() -> "Popen[bytes] | None":
    """wandb's process; None without one, or if another program has started it."""
    from wandb.sdk import wandb_setup

    # Its names for this are private; a test that stops the process tells when they change.
    connection = getattr(wandb_setup.singleton(), "_connection", None)
    return getattr(getattr(connection, "_proc", None), "_process", None)


def _kill(process: "Popen[bytes] | None", seconds: float) -> None:
    if process is not None:
        logger.warning("Weights & Biases did not answer for %.0f s: its process is ended", seconds)
        process.kill()


def _end_process() -> None:
    """Let wandb's process end. That it fails is no news, and no reason to end this one: with the
    status of its process, wandb would."""
    import wandb

    with suppress(Exception, SystemExit):
        wandb.teardown()


def _start(mode: Any, **arguments: Any) -> Any:
    """A run in `mode`, one of wandb's or None; offline where that cannot be had."""
    import wandb

    # Not the console: it is in the run's log, and wandb would put itself between it and stderr.
    settings = wandb.Settings(
        console="off",
        save_code=False,
        init_timeout=_INIT_TIMEOUT_SECONDS,
        finish_timeout=_FINISH_TIMEOUT_SECONDS,
    )
    if mode in _MODES_WITHOUT_LOGIN:
        return wandb.init(settings=settings, mode=mode, **arguments)
    try:
        # Asked here, since wandb.init would ask whoever sits at the terminal, and wait.
        if not wandb.login(prompt=False, verify=False):
            raise RuntimeError("nobody is logged in")
        return wandb.init(settings=settings, mode=mode, **arguments)
    except Exception as error:
        logger.warning(
            "Weights & Biases cannot be reached (%s). Training goes on, and its records are kept in"
            " %s: `wandb login`, then `wandb sync` with the folders offline-run-* in it uploads"
            " them.",
            " ".join(str(error).split()),
            Path(arguments["dir"]) / "wandb",
        )
        with _answers_within(_ANSWER_TIMEOUT_SECONDS):
            _end_process()  # the attempt has taken the id, and would not give it again
        return wandb.init(settings=settings, mode="offline", **arguments)
