"""`torchtitan train`: from the settings to a run, a check, or a dry run."""

import argparse
import sys
from contextlib import suppress
from dataclasses import replace

from torchtitan import preflight
from torchtitan.api.start import (
    complete_from_checkpoint,
    complete_steps,
    read_or_refuse,
    start,
)
from torchtitan.checkpoint.decision import with_stored_batch
from torchtitan.commands import config as config_command
from torchtitan.config.custom_import import import_custom_modules
from torchtitan.config.errors import ConfigError, DataError
from torchtitan.config.exit_codes import DONE, NOT_FOUND
from torchtitan.config.load import LoadedConfig, load_config
from torchtitan.config.run_context import RunContext
from torchtitan.utils import environment as env
from torchtitan.utils.environment import adopt_place
from torchtitan.utils.logging import init_logging
from torchtitan.utils.processes import StopRequest
from torchtitan.utils.text import plural

_FEW_NOTICES = 5


def run(options: argparse.Namespace) -> int:
    """Check, then train. Problems that need no torch are reported before it is imported."""
    read_or_refuse(adopt_place)
    loaded = load_config(options.settings)
    if not env.is_quiet_rank():
        _print_notices(loaded, brief=not options.check)
    if options.check:
        return _check(loaded, full=options.check == "full")
    if loaded.config.comm.mode == "fake_backend":
        return _dry_run(loaded)
    with StopRequest(at_once=True) as stop:
        return start(loaded, stop)


def _print_notices(loaded: LoadedConfig, brief: bool) -> None:
    """Print what was read differently from how it is written, and how to update the files.

    `brief`: many notices are counted, as they would hide the first lines of a run.
    """
    if brief and len(loaded.notices) > _FEW_NOTICES:
        count = len(loaded.notices)
        print(f"notice: {count} settings were read as today's; --check names them", file=sys.stderr)
    else:
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

    context = with_stored_batch(
        _context_of_check(loaded, read_or_refuse(env.read_world_size), full)
    )
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
    place = read_or_refuse(env.read_place)
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
    loaded = complete_from_checkpoint(loaded, with_weights=full)
    device: str = loaded.config.job.device
    if device == "auto":  # without `full`, assume GPUs
        device = env.guess_device_type() if full else "cuda"
    context = RunContext(loaded.config, world_size, device, full=full)
    if not full:
        return context
    return replace(context, config=complete_steps(loaded, context).config)


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
