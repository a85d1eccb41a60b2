"""`torchtitan train`: from the settings to a run, a check, or a dry run."""

import argparse
import sys
from collections.abc import Callable
from contextlib import suppress
from dataclasses import replace
from typing import TypeVar

from torchtitan import preflight
from torchtitan.checkpoint.decision import with_stored_batch
from torchtitan.checkpoint.remote_start import fetch_run
from torchtitan.commands import config as config_command
from torchtitan.config import JobConfig
from torchtitan.config.custom_import import import_custom_modules
from torchtitan.config.errors import ConfigError, ConfigIssue, DataError
from torchtitan.config.exit_codes import DONE, NOT_FOUND
from torchtitan.config.load import LoadedConfig, load_config
from torchtitan.config.run_context import RunContext
from torchtitan.config.show import show_config
from torchtitan.training.epoch_steps import with_epoch_steps
from torchtitan.training.pretrained_config import with_pretrained
from torchtitan.utils import environment as env
from torchtitan.utils.environment import adopt_place
from torchtitan.utils.host import spin_briefly, tune_cpu_allocator
from torchtitan.utils.logging import init_logging
from torchtitan.utils.processes import StopRequest, end_with_launcher
from torchtitan.utils.text import plural

T = TypeVar("T")


def run(options: argparse.Namespace) -> int:
    """Check, then train. Problems that need no torch are reported before it is imported."""
    _read(adopt_place)
    loaded = load_config(options.settings)
    if not env.is_quiet_rank():
        _print_notices(loaded)
    if options.check:
        return _check(loaded, full=options.check == "full")
    if loaded.config.comm.mode == "fake_backend":
        return _dry_run(loaded)
    with StopRequest(at_once=True) as stop:
        return _train(loaded, stop)


def _train(loaded: LoadedConfig, stop: StopRequest) -> int:
    place = _read(env.read_environment)
    end_with_launcher()
    problems = import_custom_modules(loaded.config, quiet=place.rank != 0)
    if problems:
        raise ConfigError(problems)
    for notice in fetch_run(loaded.config, place.rank == 0):
        print(f"notice: {notice}", file=sys.stderr)
    loaded = _with_pretrained(loaded)
    device: str = loaded.config.job.device
    if device == "auto":
        device = env.guess_device_type()
    context = RunContext(loaded.config, place.world_size, device)
    loaded = _with_epoch_steps(loaded, context)
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

    return run_training(loaded.config, place, check_environment, check_resolved, stop)


def _with_pretrained(loaded: LoadedConfig, with_weights: bool = True) -> LoadedConfig:
    """Complete the config from the checkpoint that the run starts from, and print notices."""
    return _with_notices(with_pretrained(loaded, with_weights), loaded)


def _with_epoch_steps(loaded: LoadedConfig, context: RunContext) -> LoadedConfig:
    """Set the steps of a run that only says its epochs, and print a notice."""
    return _with_notices(with_epoch_steps(loaded, context), loaded)


def _with_notices(complete: LoadedConfig, loaded: LoadedConfig) -> LoadedConfig:
    """Print what `complete` says that `loaded` does not, and return it."""
    if not env.is_quiet_rank():
        for notice in complete.notices[len(loaded.notices) :]:
            print(f"notice: {notice}", file=sys.stderr)
    return complete


def _print_notices(loaded: LoadedConfig) -> None:
    """Print what was read differently from how it is written, and how to update the files."""
    config_command.print_notices(loaded)
    for file in loaded.outdated:
        hint = f"`torchtitan config convert {file}` writes the file with today's keys"
        print(f"notice: {hint}", file=sys.stderr)


def _check(loaded: LoadedConfig, full: bool) -> int:
    """Check everything for the world size in the environment; print one line if nothing is wrong.

    Without `full`, a file that is absent here may exist where the run trains, so it is a warning;
    it was not checked, so the exit status is not 0.
    """
    from torchtitan.data.listing import listed_once

    context = with_stored_batch(_context_of_check(loaded, _read(env.read_world_size), full))
    quiet = env.is_quiet_rank()
    with listed_once():
        warnings = preflight.require(context, quiet=quiet)
        lines = [] if quiet else describe_data(context)
    for line in lines:
        print(line, file=sys.stderr)
    absent = list(dict.fromkeys(problem.key for problem in warnings if problem.missing_asset))
    if not quiet:
        verdict = (
            f"not found here, so not checked: {', '.join(absent)}; else ok" if absent else "ok"
        )
        print(f"{verdict}: {summary(context)}")
    return NOT_FOUND if absent else DONE


def describe_data(context: RunContext) -> list[str]:
    """Return a line about each dataset that can be read, for `--check`."""
    from torchtitan.data.chat_encoder import describe_rows
    from torchtitan.data.named_sources import describe_source, named_sources, validation_sets
    from torchtitan.data.registry import build_source
    from torchtitan.data.tokenizers import build_tokenizer
    from torchtitan.preflight.data_files import is_left_out

    config = context.config
    lines, said = list[str](), list[str]()
    for named in [*named_sources(config.training, config.data), *validation_sets(config)]:
        if is_left_out(named, context.full):
            continue
        with suppress(ConfigError, DataError):
            lines.append(describe_source(named, build_source(named.training, named.data)))
        with suppress(ConfigError):
            tokenizer = build_tokenizer(config.model.tokenizer_path)
            said.append(describe_rows(named.training, named.data, tokenizer))
    return [*lines, *dict.fromkeys(said)]


def _dry_run(loaded: LoadedConfig) -> int:
    """Run one step as one rank of WORLD_SIZE, in this process alone, and print a report."""
    place = _read(env.read_place)
    context = _context_of_check(loaded, place.world_size, full=False)
    config = context.config
    # A dry run leaves the run folder alone.
    preflight.require(context, [preflight.ARITHMETIC, preflight.FILES, preflight.MODEL])

    from torchtitan.commands.dry_run import dry_run
    from torchtitan.commands.dry_run_report import report

    init_logging(place.rank, {place.rank})  # what handlers say of the model; print_after_conversion
    of = f"{config.model.name} {config.model.flavor}"
    print(f"Dry run of a step of {of} as rank {place.rank} of {place.world_size} ...", flush=True)
    print(report(dry_run(context, place.rank), context))
    return DONE


def _context_of_check(loaded: LoadedConfig, world_size: int, full: bool) -> RunContext:
    """Return the context of a config that is checked outside of its run."""
    problems = import_custom_modules(loaded.config)
    if problems:
        raise ConfigError(problems)
    loaded = _with_pretrained(loaded, with_weights=full)
    device: str = loaded.config.job.device
    if device == "auto":  # without `full`, assume GPUs
        device = env.guess_device_type() if full else "cuda"
    context = RunContext(loaded.config, world_size, device, full=full)
    if not full:
        return context
    return replace(context, config=_with_epoch_steps(loaded, context).config)


def summary(context: RunContext) -> str:
    """Return the resolved mesh, batch and lanes in one line."""
    config = context.config
    replicate = config.parallelism.data_parallel_replicate_degree
    mesh = f"data parallel {replicate} (replicate) x {context.shard_degree} (shard)"
    for kind in ("tensor", "context", "pipeline"):
        degree = getattr(config.parallelism, f"{kind}_parallel_degree")
        mesh += f", {kind} parallel {degree}" if degree > 1 else ""
    name = f"{config.model.name} {config.model.flavor}"
    return (
        f"{name} on {plural(context.world_size, 'process')}: {mesh};"
        f" {context.describe_batch()}; {plural(context.num_lanes, 'lane')}"
    )


def _read(read: Callable[[], T]) -> T:
    """Read the environment. Raises ConfigError."""
    try:
        return read()
    except env.EnvironmentFaults as faults:
        raise ConfigError(
            [ConfigIssue(f.name, f.problem, f.fix, local=True) for f in faults.faults]
        ) from None
