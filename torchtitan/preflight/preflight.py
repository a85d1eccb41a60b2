"""Everything that can be known to be wrong is found before anything starts.

Each feature checks its own settings: `check_static(context)` by arithmetic alone, without torch,
and `check_environment(context)` by looking at files. This module runs them in order and collects
the problems, so that a user reads all of them at once instead of one per attempt.
"""

import importlib
import sys
from collections.abc import Callable, Iterable, Sequence
from dataclasses import replace
from functools import partial
from pathlib import Path

from torchtitan.config.errors import ConfigError, ConfigIssue, DataError, errors_of
from torchtitan.config.run_context import RunContext
from torchtitan.config.shipped import found_elsewhere

ARITHMETIC = "arithmetic"
"""Config and world size alone: no torch, no file."""
FILES = "files"
"""The tokenizer, the data, the folders. Only rank 0 need look."""
HARDWARE = "hardware"
"""This machine's devices, for `context.full` only. Imports torch."""
MODEL = "model"
"""The model on the meta device. Imports torch."""
CHECKPOINTS = "checkpoints"
"""What the run folder holds already. No torch."""
PHASES = (ARITHMETIC, FILES, HARDWARE, MODEL, CHECKPOINTS)

_FEATURES = (
    "torchtitan.preflight.mesh",
    "torchtitan.preflight.model",
    "torchtitan.preflight.tensor_parallel",
    "torchtitan.preflight.context_parallel",
    "torchtitan.preflight.pipeline_parallel",
    "torchtitan.preflight.memory",
    "torchtitan.preflight.data",
    "torchtitan.preflight.validation",
    "torchtitan.preflight.components",
    "torchtitan.preflight.loss",
    "torchtitan.preflight.handlers",
    "torchtitan.preflight.checkpoint",
)
_PROBES = {
    FILES: (
        "torchtitan.preflight.pipeline_parallel",
        "torchtitan.preflight.data",
        "torchtitan.preflight.validation",
        "torchtitan.preflight.components",
    ),
    HARDWARE: ("torchtitan.preflight.hardware", "torchtitan.preflight.handlers"),
    MODEL: (
        "torchtitan.preflight.model",
        "torchtitan.preflight.parameter_names",
        "torchtitan.preflight.initial_weights",
        "torchtitan.preflight.handlers_on_model",
        "torchtitan.preflight.sharding",
    ),
    CHECKPOINTS: ("torchtitan.preflight.checkpoint",),
}


def preflight(context: RunContext, phases: Sequence[str] = PHASES) -> list[ConfigIssue]:
    """The problems of the given phases, warnings included, each once.

    A feature whose arithmetic fails is not probed: its files cannot be judged then. Nothing is
    probed on a mesh that does not exist.
    """
    problems: list[ConfigIssue] = []
    broken: set[str] = set()
    for feature in _FEATURES:
        found = _function(feature, "check_static")(context)
        if errors_of(found):
            broken.add(feature)
        if ARITHMETIC in phases:
            problems += found
    if _FEATURES[0] not in broken:
        for phase in phases:
            for feature in _PROBES.get(phase, ()):
                if feature not in broken and (phase != HARDWARE or context.full):
                    problems += _function(feature, "check_environment")(context)
    if CHECKPOINTS in phases and not errors_of(problems):
        problems += _problems_of_the_stored_run(context)
        if MODEL in phases and context.full and not errors_of(problems):
            problems += data_problems(context)
    unique = list({str(problem): problem for problem in problems}.values())
    unique = [_naming_the_other_place(problem, context) for problem in unique]
    return unique if context.full else [_downgraded(problem) for problem in unique]


def _problems_of_the_stored_run(context: RunContext) -> list[ConfigIssue]:
    """Of the batch size and lanes that the run in the folder has: the mesh may be new to them."""
    from torchtitan.checkpoint.decision import decide, resolved_config

    config = context.config
    try:
        decision = decide(config, context, Path(config.job.dump_folder).resolve())
    except ConfigError as error:
        return error.problems
    if decision.action == "finished" or (decision.action == "new" and not decision.step):
        return []
    return preflight(replace(context, config=resolved_config(config, decision)), [ARITHMETIC])


def data_problems(context: RunContext) -> list[ConfigIssue]:
    """Compare data, tokenizer and cutting with those of the run that a start goes on with. The
    data's files are opened; what keeps them from being read is told by other phases."""
    from torchtitan.checkpoint import stored_run
    from torchtitan.checkpoint.decision import decide, resolved_config
    from torchtitan.checkpoint.manifest import InvalidCheckpoint

    config = context.config
    try:
        decision = decide(config, context, Path(config.job.dump_folder).resolve())
        config = resolved_config(config, decision)
        state = stored_run.stored_state(config, decision)
    except (ConfigError, InvalidCheckpoint):
        return []
    if state.get("data_fingerprint") is None:
        return []
    from torchtitan.data import identity, loader
    from torchtitan.data.tokenizers import build_tokenizer

    try:
        tokenizer = build_tokenizer(config.model.tokenizer_path)
        mixture = loader.build_mixture(
            config.training, config.data, config.debug.seed, tokenizer, decision.num_lanes
        )
        now = loader.data_facts(mixture)  # reads the files
    except (ConfigError, DataError):
        return []
    if identity.names_data(state["data_fingerprint"], now):
        return []
    compare = partial(identity.differences, now=identity.summary_of(now), anew=config.data.restart)
    fingerprint = identity.fingerprint_of(now)
    return stored_run.data_problems(config.checkpoint, state, fingerprint, compare)


def report(problems: Iterable[ConfigIssue], quiet: bool = False) -> None:
    """Print each problem once to stderr; `quiet` is for the ranks that see what rank 0 prints."""
    if quiet:
        return
    for problem in problems:
        print(f"{problem.severity}: {problem}", file=sys.stderr)


def require(
    context: RunContext, phases: Sequence[str] = PHASES, quiet: bool = False
) -> list[ConfigIssue]:
    """Run the phases, print the warnings and return them; raise `ConfigError` with the errors."""
    problems = preflight(context, phases)
    errors = errors_of(problems)
    warnings = [problem for problem in problems if problem not in errors]
    report(warnings, quiet)
    if errors:
        raise ConfigError(errors)
    return warnings


def require_same_data(context: RunContext) -> None:
    """Raise `ConfigError` unless a start goes on with the data that its checkpoint knows."""
    problems = data_problems(context)
    if problems:
        raise ConfigError(problems)


def _function(module: str, name: str) -> Callable[[RunContext], list[ConfigIssue]]:
    """The module is imported when it is asked, because some probes need torch."""
    return getattr(importlib.import_module(module), name)


def _naming_the_other_place(problem: ConfigIssue, context: RunContext) -> ConfigIssue:
    """A relative path starts where the process does, and may be meant to start elsewhere."""
    text = problem.value if problem.missing_asset and isinstance(problem.value, str) else ""
    place = found_elsewhere(text, context.config.job.config_file)
    if place is None:
        return problem
    fix = f"{problem.fix.rstrip('.')}; did you mean {place}? A relative path starts in the current"
    return replace(problem, fix=f"{fix} folder, {Path.cwd()}")


def _downgraded(problem: ConfigIssue) -> ConfigIssue:
    """Away from the machine that will train, an absent file is worth a warning only."""
    if problem.missing_asset and problem.severity == "error":
        return replace(problem, severity="warning")
    return problem
