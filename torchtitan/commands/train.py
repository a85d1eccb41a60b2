"""The word `train`: from a command line to a run, or to the list of what stands in its way."""

import sys
from collections.abc import Callable
from dataclasses import replace
from typing import TypeVar

from torchtitan.checkpoint.decision import with_stored_batch
from torchtitan.config import JobConfig
from torchtitan.config.custom_import import import_custom_modules
from torchtitan.config.errors import ConfigError, ConfigIssue
from torchtitan.config.exit_codes import DONE, NOT_FOUND
from torchtitan.config.load import LoadedConfig, load_config
from torchtitan.config.run_context import RunContext
from torchtitan.config.show import show_config
from torchtitan.preflight import preflight
from torchtitan.utils import environment as env
from torchtitan.utils.allocator import tune_cpu_allocator
from torchtitan.utils.children import end_with_launcher
from torchtitan.utils.launchers import adopt_place
from torchtitan.utils.logging import init_logging
from torchtitan.utils.threads import spin_briefly

T = TypeVar("T")


def run(argv: list[str]) -> int:
    """Check, then train. Problems that need no torch are told before it is imported."""
    if "--help" in argv or "-h" in argv:
        return _help([word for word in argv if word not in ("--help", "-h")])
    _read(adopt_place)
    arguments, check = _split_check(argv)
    loaded = load_config(arguments)
    if not env.is_quiet_rank():
        tell_notices(loaded)
    if check:
        return _check(loaded, full=check == "full")
    if loaded.config.comm.mode == "fake_backend":
        return _dry_run(loaded)
    place = _read(env.read_environment)
    end_with_launcher()
    problems = import_custom_modules(loaded.config, quiet=place.rank != 0)
    if problems:
        raise ConfigError(problems)
    device = loaded.config.job.device
    context = RunContext(
        config=loaded.config,
        world_size=place.world_size,
        device_type=env.guess_device_type() if device == "auto" else device,
    )
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
        """Batch size and lanes may be those stored with the run, and the mesh be new to them."""
        # The warnings are printed above.
        preflight.require(replace(context, config=resolved), [preflight.ARITHMETIC], quiet=True)
        preflight.require_same_data(context)

    return run_training(loaded.config, place, check_environment, check_resolved)


def _help(argv: list[str]) -> int:
    """All settings, with those of what the config's own modules register."""
    from torchtitan.commands.config import named_tables
    from torchtitan.config.help_text import print_help

    try:
        arguments, _ = _split_check(argv)
        import_custom_modules(load_config(arguments).config, quiet=True)
    except ConfigError:
        pass  # told when it is to be run
    print_help(named_tables())
    return DONE


def tell_notices(loaded: LoadedConfig) -> None:
    """Say what the keys of an older release are today."""
    for notice in loaded.notices:
        print(f"notice: {notice}", file=sys.stderr)
    file = loaded.config.job.config_file
    if file and not all(notice.startswith("--") for notice in loaded.notices):
        hint = f"`torchtitan config convert {file}` writes the file with today's keys"
        print(f"notice: {hint}", file=sys.stderr)


def _check(loaded: LoadedConfig, full: bool) -> int:
    """All phases for the world size in the environment; prints one line when nothing is wrong.

    What is not on this machine may be on the one that trains, so it is no error without `full`.
    But it was not looked at, so that is not "ok", nor the exit status 0.
    """
    from torchtitan.data.listing import listed_once
    from torchtitan.preflight.data_files import describe_data

    context = with_stored_batch(_facts_of_a_look(loaded, _read(env.read_world_size), full))
    quiet = env.is_quiet_rank()
    with listed_once():
        warnings = preflight.require(context, quiet=quiet)
        lines = [] if quiet else describe_data(context)
    for line in lines:
        print(line, file=sys.stderr)
    absent = list(dict.fromkeys(problem.key for problem in warnings if problem.missing_asset))
    if not quiet:
        verdict = (
            f"not checked, as it is not here: {', '.join(absent)}; else ok" if absent else "ok"
        )
        print(f"{verdict}: {summary(context)}")
    return NOT_FOUND if absent else DONE


def _dry_run(loaded: LoadedConfig) -> int:
    """Run one step as one rank of WORLD_SIZE, in this process alone, and print a report."""
    config, place = loaded.config, _read(env.read_place)
    context = _facts_of_a_look(loaded, place.world_size, full=False)
    # A dry run leaves the run folder alone.
    preflight.require(context, [preflight.ARITHMETIC, preflight.FILES, preflight.MODEL])

    from torchtitan.commands.dry_run import dry_run, report

    init_logging(place.rank, {place.rank})  # what handlers say of the model; print_after_conversion
    of = f"{config.model.name} {config.model.flavor}"
    print(f"Dry run of a step of {of} as rank {place.rank} of {place.world_size} ...", flush=True)
    print(report(dry_run(context, place.rank), context))
    return DONE


def _facts_of_a_look(loaded: LoadedConfig, world_size: int, full: bool) -> RunContext:
    """For looking at a config from outside of its run."""
    problems = import_custom_modules(loaded.config)
    if problems:
        raise ConfigError(problems)
    device: str = loaded.config.job.device
    if device == "auto":  # without looking at this machine, a run is meant for GPUs
        device = env.guess_device_type() if full else "cuda"
    return RunContext(loaded.config, world_size, device, full=full)


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
        f"{name} on {context.world_size} process{'es' if context.world_size > 1 else ''}: {mesh};"
        f" {context.describe_batch()}; {context.num_lanes} lanes"
    )


def _read(read: Callable[[], T]) -> T:
    """What `read` finds in the environment."""
    try:
        return read()
    except env.EnvironmentFaults as faults:
        raise _config_error(faults) from None


def _config_error(error: env.EnvironmentFaults) -> ConfigError:
    problems = []
    for fault in error.faults:
        key = fault.variable if fault.value is None else f"{fault.variable} = {fault.value}"
        problems.append(ConfigIssue(key, fault.problem, fault.fix, local=True))
    return ConfigError(problems)


def _split_check(argv: list[str]) -> tuple[list[str], str]:
    """argv without `--check`, and "", "check" or "full"."""
    arguments: list[str] = []
    check = ""
    rest = list(argv)
    while rest:
        argument = rest.pop(0)
        flag, _, value = argument.partition("=")
        if flag != "--check":
            arguments.append(argument)
            continue
        if not value and rest and rest[0] == "full":
            value = rest.pop(0)
        if value not in ("", "full"):
            problem = ConfigIssue(
                "--check", "is not a kind of check", "write --check or --check full"
            )
            raise ConfigError(problem)
        check = value or check or "check"
    return arguments, check
