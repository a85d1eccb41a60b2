"""Weights & Biases: the records of a run as one wandb run, under TensorBoard's tags.

wandb's environment variables, login and offline mode work as usual. A failure of wandb never stops
training: without a login or a network, records are kept in the run folder in wandb's own format,
and `wandb sync` uploads them later. The wandb run has the id of the run folder, so a resume
continues it.

wandb passes records through a child process, `wandb-core`, and waits for it without a limit, also
when Python exits; no setting of wandb changes that. So a child that does not answer in time is
killed, which ends every wait with an error.

The x-axis is the `step` of each record instead of wandb's own count of calls, which cannot go back
after a resume. Steps that are trained again appear twice.
"""

import logging
import os
import signal
import threading
from collections.abc import Iterator
from contextlib import contextmanager, suppress
from pathlib import Path
from typing import Any

from torchtitan.metrics.sinks import Record, SinkRun, tagged
from torchtitan.utils.environment import WandbEnvironment
from torchtitan.utils.redaction import redact_tree

logger = logging.getLogger(__name__)

DEFAULT_PROJECT = "torchtitan"
_MODES_WITHOUT_LOGIN = ("offline", "dryrun", "disabled")
_INIT_TIMEOUT_SECONDS = 60.0
_FINISH_TIMEOUT_SECONDS = 20.0
"""For uploads at the end. A launcher that stops the run kills it after 30."""
_ANSWER_TIMEOUT_SECONDS = 30.0
"""For any other answer. Other ranks wait meanwhile, by default for 100."""


class WandbSink:
    """A wandb run, started on creation; the config is uploaded without secrets.

    Where every rank writes, each has its own wandb run; these form a group.
    """

    name = "Weights & Biases"
    keeps_trying = False

    def __init__(self, run: SinkRun, environment: WandbEnvironment, description: str = ""):
        suffix = "" if run.rank is None else f"-rank{run.rank}"
        name = environment.name or run.folder.name
        self._run = _start(
            environment.mode,
            dir=str(run.folder),
            id=(environment.run_id or run.run_id) + suffix,
            resume="allow",
            project=environment.project or DEFAULT_PROJECT,
            entity=environment.entity,
            name=name + suffix,
            group=environment.group or (name if run.rank is not None else None),
            job_type=environment.job_type,
            tags=list(environment.tags) or None,
            notes=environment.notes or description or None,
            config=redact_tree(run.config),
        )
        self._run.define_metric("step")
        self._run.define_metric("*", step_metric="step")

    def resume(self, step: int) -> None:
        """Keep what is there: wandb cannot remove records."""

    def write(self, record: Record) -> None:
        """Send the record to `wandb-core`."""
        with _answers_within(_ANSWER_TIMEOUT_SECONDS):
            self._run.log({"step": record["step"], **tagged(record)})

    def flush(self) -> None:
        """Do nothing: `wandb-core` writes what it has received, also if this process dies."""

    def close(self, failed: bool = False) -> None:
        """Finish the wandb run and end its process."""
        with _answers_within(_FINISH_TIMEOUT_SECONDS + _ANSWER_TIMEOUT_SECONDS):
            try:
                self._run.finish(exit_code=1 if failed else 0)
            finally:  # not left to the end of Python, which would wait without a limit
                _end_service()


@contextmanager
def _answers_within(seconds: float) -> Iterator[None]:
    """Kill wandb's child process if the body takes longer, which makes waiting calls fail."""
    timer = threading.Timer(seconds, _kill_service, [seconds])
    timer.daemon = True
    timer.start()
    try:
        yield
    finally:
        timer.cancel()


def _kill_service(seconds: float) -> None:
    """Kill the children of this process that are wandb's (Linux)."""
    for children in Path("/proc/self/task").glob("*/children"):
        with suppress(OSError):  # a thread that has ended, or no such file in this kernel
            for pid in children.read_text().split():
                _kill_if_wandb(int(pid), seconds)


def _kill_if_wandb(pid: int, seconds: float) -> None:
    with suppress(OSError):  # it has ended
        if Path(f"/proc/{pid}/comm").read_text().startswith("wandb"):
            text = "Weights & Biases did not answer for %.0f s: its process is killed"
            logger.warning(text, seconds)
            os.kill(pid, signal.SIGKILL)


def _end_service() -> None:
    """End wandb's child process. wandb would end this process, too, if the child failed."""
    import wandb

    with suppress(Exception, SystemExit):
        wandb.teardown()


def _start(mode: Any, **arguments: Any) -> Any:
    """Start a wandb run in `mode` (None: wandb's default), or offline where that fails."""
    import wandb

    # The console is in the run's log already, and wandb would redirect stderr.
    settings = wandb.Settings(
        console="off",
        save_code=False,
        init_timeout=_INIT_TIMEOUT_SECONDS,
        finish_timeout=_FINISH_TIMEOUT_SECONDS,
    )
    if mode in _MODES_WITHOUT_LOGIN:
        return wandb.init(settings=settings, mode=mode, **arguments)
    try:
        # Without this wandb.init would prompt on the terminal and wait.
        if not wandb.login(prompt=False, verify=False):
            raise RuntimeError("nobody is logged in")
        return wandb.init(settings=settings, mode=mode, **arguments)
    except Exception as error:
        logger.warning(
            "Weights & Biases cannot be reached (%s). Training continues, and its records are kept"
            " in %s: `wandb login`, then `wandb sync` with the folders offline-run-* in it uploads"
            " them.",
            " ".join(str(error).split()),
            Path(arguments["dir"]) / "wandb",
        )
        with _answers_within(_ANSWER_TIMEOUT_SECONDS):
            _end_service()  # the failed attempt still holds the id
        return wandb.init(settings=settings, mode="offline", **arguments)
