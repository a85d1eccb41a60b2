"""Weights & Biases: the records of a run as one run there, under the tags that TensorBoard has.

wandb is used as its users know it: its variables, its login, its offline mode. What it cannot do
never stops a run. Without a login or a network, records are kept in the run folder in wandb's own
format, and `wandb sync` uploads them later. The id of the run there is that of the run folder, so a
resume goes on with it.

The x-axis is the step of each record (`step`), not wandb's count of calls: that one cannot go back,
and a resume does. Steps that are trained again after a resume appear there twice.
"""

import logging
from collections.abc import Mapping
from pathlib import Path
from typing import Any

from torchtitan.components.sinks import Record, tagged
from torchtitan.utils.environment import WandbEnvironment
from torchtitan.utils.redaction import redact_tree

logger = logging.getLogger(__name__)

DEFAULT_PROJECT = "torchtitan"
_MODES_WITHOUT_LOGIN = ("offline", "dryrun", "disabled")
_INIT_TIMEOUT_SECONDS = 60.0
_FINISH_TIMEOUT_SECONDS = 60.0


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
        self._run.log({"step": record["step"], **tagged(record)})

    def flush(self) -> None:
        """Nothing to do: a process of wandb's writes what it was sent, also if this one dies."""

    def close(self, failed: bool = False) -> None:
        self._run.finish(exit_code=1 if failed else 0)


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
        wandb.teardown()  # the attempt has taken the id, and its process would not give it again
        return wandb.init(settings=settings, mode="offline", **arguments)
