"""`load_config` and `train`: a run in the process of a script or notebook."""

import os
import sys
from collections.abc import Mapping, Sequence
from contextlib import suppress
from pathlib import Path
from typing import Any

from torchtitan.api.run import Run
from torchtitan.api.start import print_notices, read_or_refuse, start
from torchtitan.config import CheckpointError, ConfigError, ConfigIssue, JobConfig
from torchtitan.config.exit_codes import CHECKPOINT, PREEMPTED
from torchtitan.config.load import load_over
from torchtitan.utils import environment as env
from torchtitan.utils.host import restart_clock
from torchtitan.utils.in_process import one_at_a_time, process_as_it_was
from torchtitan.utils.processes import StopRequest, StopRequested

_PATIENCE_SECONDS = 60.0  # of a rank that refuses to start, for rank 0


def load_config(
    source: str | Path | JobConfig | None = None,
    settings: Mapping[str, Any] | Sequence[str] = (),
) -> JobConfig:
    """Return a checked config: that of `source`, with `settings` over it.

    What was read differently from how it is written is printed to stderr.

    Args:
        source: a TOML file, the name of a shipped config, another config, or None for defaults.
        settings: values by key, `{"training.steps": 20}` or `{"training": {"steps": 20}}`, or the
            words of a command line, `["--training.steps", "20"]`.

    Raises:
        ConfigError: with every issue found, in `problems`.
    """
    if not isinstance(source, str | os.PathLike | JobConfig | None):
        raise TypeError("settings are the second argument: load_config(None, {...})")
    base = source if source is None or isinstance(source, JobConfig) else os.fspath(source)
    loaded = load_over(base, settings)
    if not env.is_quiet_rank():
        print_notices(loaded.notices)
    return loaded.config


def train(config: JobConfig) -> Run:
    """Train in this process as `torchtitan train` does, and return the run.

    Everything is checked first. A run that is in `job.dump_folder` goes on from its newest
    checkpoint. Under a launcher such as torchrun all ranks call it. Ctrl-C, or a notebook's
    interrupt, saves and returns after the step, with the status "preempted"; a second one raises
    KeyboardInterrupt at once. On another thread than the main one signals are left alone.

    Raises:
        ConfigError: a setting cannot work; nothing was started.
        DataError: data or a tokenizer cannot be read.
        CheckpointError: a checkpoint cannot be read, written, exported or uploaded.
        NonFiniteError: the loss, the gradients or the weights are not finite.
        HangError: a rank did not arrive in time.
    """
    if not isinstance(config, JobConfig):
        raise TypeError("train takes a config, as load_config returns it")
    if config.comm.mode == "fake_backend":
        text, fix = (
            "asks for a dry run, which is a command",
            "leave it out, or run torchtitan train",
        )
        raise ConfigError(ConfigIssue("comm.mode", text, fix, config.comm.mode))
    with one_at_a_time(), process_as_it_was(), StopRequest(at_once=True) as stop:
        restart_clock()
        _require_no_group()
        read_or_refuse(env.adopt_place)
        try:
            status = start(load_over(config), stop, in_process=True)
        except ConfigError as error:
            _share(error)
            raise
        except StopRequested:  # before there was anything to save
            sys.exit(PREEMPTED)
    if status == CHECKPOINT:
        text = "the run has ended and is saved, but was not exported or uploaded; the log says why"
        raise CheckpointError(text)
    return Run(config.job.dump_folder)


def _require_no_group() -> None:
    from torchtitan.distributed.context import require_no_group

    require_no_group()


def _share(error: ConfigError) -> None:
    """Let all ranks end, as this one cannot start."""
    place = None
    with suppress(env.EnvironmentFaults):
        place = env.read_environment()
    if place is not None and place.world_size > 1 and not error.known_to_all:
        from torchtitan.distributed.context import share_refusal

        share_refusal(place, error.problems, _PATIENCE_SECONDS)
