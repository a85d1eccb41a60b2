"""The start of a training run, the same for the command and for Python: checks, then the run."""

import sys
from collections.abc import Callable, Sequence
from dataclasses import replace
from typing import TypeVar

from torchtitan import preflight
from torchtitan.checkpoint.decision import with_stored_batch
from torchtitan.checkpoint.remote_start import fetch_run
from torchtitan.config import JobConfig
from torchtitan.config.custom_import import import_custom_modules
from torchtitan.config.errors import ConfigError, ConfigIssue
from torchtitan.config.load import LoadedConfig
from torchtitan.config.run_context import RunContext
from torchtitan.config.show import show_config
from torchtitan.training.epoch_steps import with_epoch_steps
from torchtitan.training.pretrained_config import with_pretrained
from torchtitan.utils import environment as env
from torchtitan.utils.host import spin_briefly, tune_cpu_allocator
from torchtitan.utils.processes import StopRequest, end_with_launcher

T = TypeVar("T")


def start(loaded: LoadedConfig, stop: StopRequest, in_process: bool = False) -> int:
    """Check, then train as one process of a run, and return the exit status.

    Problems that need no torch are reported before it is imported. `stop` is entered.
    `in_process`: see `training.run.run`. Raises ConfigError.
    """
    place = read_or_refuse(env.read_environment)
    end_with_launcher()
    problems = import_custom_modules(loaded.config, quiet=place.rank != 0)
    if problems:
        raise ConfigError(problems)
    for notice in fetch_run(loaded.config, place.rank == 0):
        print(f"notice: {notice}", file=sys.stderr)
    loaded = complete_from_checkpoint(loaded)
    device: str = loaded.config.job.device
    if device == "auto":
        device = env.guess_device_type()
    context = RunContext(loaded.config, place.world_size, device)
    loaded = complete_steps(loaded, context)
    context = replace(context, config=loaded.config)
    phases = [preflight.ARITHMETIC]
    if place.rank == 0:
        phases += [preflight.FILES, preflight.CHECKPOINTS]
    preflight.require(with_stored_batch(context), phases, quiet=place.rank != 0)
    if loaded.config.job.print_config and place.rank == 0:
        print(show_config(loaded))

    if context.device_type == "cpu":
        spin_briefly()
    if loaded.config.debug.cpu_allocator == "tuned" and context.device_type == "cpu":
        tune_cpu_allocator()  # before torch makes its first large allocation

    from torchtitan.training.run import run as run_training

    def check_environment(context: RunContext) -> None:
        phases = [preflight.HARDWARE] + [preflight.MODEL] * (place.rank == 0)
        preflight.require(with_stored_batch(context), phases)

    def check_resolved(context: RunContext, resolved: JobConfig) -> None:
        """Check again: batch size and lanes may be those of the stored run, on another mesh."""
        # The warnings are printed above.
        preflight.require(replace(context, config=resolved), [preflight.ARITHMETIC], quiet=True)
        issues = preflight.check_same_data(context)
        if issues:
            raise ConfigError(issues)

    return run_training(loaded.config, place, check_environment, check_resolved, stop, in_process)


def complete_from_checkpoint(loaded: LoadedConfig, with_weights: bool = True) -> LoadedConfig:
    """Complete the config from the checkpoint that the run starts from, and print notices."""
    return _with_notices(with_pretrained(loaded, with_weights), loaded)


def complete_steps(loaded: LoadedConfig, context: RunContext) -> LoadedConfig:
    """Set the steps of a run that only says its epochs, and print a notice."""
    return _with_notices(with_epoch_steps(loaded, context), loaded)


def _with_notices(complete: LoadedConfig, loaded: LoadedConfig) -> LoadedConfig:
    """Print what `complete` says that `loaded` does not, and return it."""
    if not env.is_quiet_rank():
        print_notices(complete.notices[len(loaded.notices) :])
    return complete


def print_notices(notices: Sequence[str]) -> None:
    """Print, to stderr, what was read or completed differently from how it is written."""
    for notice in notices:
        print(f"notice: {notice}", file=sys.stderr)


def read_or_refuse(read: Callable[[], T]) -> T:
    """Read the launcher's variables. Raises ConfigError."""
    try:
        return read()
    except env.EnvironmentFaults as faults:
        raise ConfigError(
            [ConfigIssue(f.name, f.problem, f.fix, local=True) for f in faults.faults]
        ) from None
