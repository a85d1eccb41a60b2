"""Everything that can be known to be wrong is found before anything starts.

Each feature checks its own settings: `check(facts)` by arithmetic alone, without torch, and
`probe(facts)` by looking at files. This module runs them in order and collects the problems, so
that a user reads all of them at once instead of one per attempt.
"""

import importlib
import sys
from collections.abc import Callable, Iterable, Sequence
from dataclasses import replace
from functools import partial
from pathlib import Path

from torchtitan.config.errors import ConfigError, DataError, Problem, errors_of
from torchtitan.config.facts import Facts
from torchtitan.config.shipped import found_elsewhere

ARITHMETIC = "arithmetic"
"""Config and world size alone: no torch, no file."""
FILES = "files"
"""The tokenizer, the data, the folders. Only rank 0 need look."""
HARDWARE = "hardware"
"""This machine's devices, for `facts.full` only. Imports torch."""
MODEL = "model"
"""The model on the meta device. Imports torch."""
CHECKPOINTS = "checkpoints"
"""What the run folder holds already. No torch."""
PHASES = (ARITHMETIC, FILES, HARDWARE, MODEL, CHECKPOINTS)

_FEATURES = (
    "torchtitan.config.checks",
    "torchtitan.models.checks",
    "torchtitan.distributed.tensor_checks",
    "torchtitan.distributed.context_checks",
    "torchtitan.distributed.pipeline_checks",
    "torchtitan.distributed.memory_checks",
    "torchtitan.data.checks",
    "torchtitan.data.validation_sets",
    "torchtitan.components.checks",
    "torchtitan.components.loss_checks",
    "torchtitan.handlers.checks",
    "torchtitan.checkpoint.checks",
)
_PROBES = {
    FILES: (
        "torchtitan.distributed.pipeline_checks",
        "torchtitan.data.checks",
        "torchtitan.data.validation_sets",
        "torchtitan.components.checks",
    ),
    HARDWARE: ("torchtitan.distributed.checks", "torchtitan.handlers.checks"),
    MODEL: (
        "torchtitan.models.checks",
        "torchtitan.components.model_checks",
        "torchtitan.checkpoint.model_checks",
        "torchtitan.handlers.model_checks",
        "torchtitan.handlers.cut_checks",
    ),
    CHECKPOINTS: ("torchtitan.checkpoint.checks",),
}


def preflight(facts: Facts, phases: Sequence[str] = PHASES) -> list[Problem]:
    """The problems of the given phases, warnings included, each once.

    A feature whose arithmetic fails is not probed: its files cannot be judged then. Nothing is
    probed on a mesh that does not exist.
    """
    problems: list[Problem] = []
    broken: set[str] = set()
    for feature in _FEATURES:
        found = _function(feature, "check")(facts)
        if errors_of(found):
            broken.add(feature)
        if ARITHMETIC in phases:
            problems += found
    if _FEATURES[0] not in broken:
        for phase in phases:
            for feature in _PROBES.get(phase, ()):
                if feature not in broken and (phase != HARDWARE or facts.full):
                    problems += _function(feature, "probe")(facts)
    if CHECKPOINTS in phases and not errors_of(problems):
        problems += _problems_of_the_stored_run(facts)
        if MODEL in phases and facts.full and not errors_of(problems):
            problems += data_problems(facts)
    unique = list({str(problem): problem for problem in problems}.values())
    unique = [_naming_the_other_place(problem, facts) for problem in unique]
    return unique if facts.full else [_downgraded(problem) for problem in unique]


def _problems_of_the_stored_run(facts: Facts) -> list[Problem]:
    """Of the batch size and lanes that the run in the folder has: the mesh may be new to them."""
    from torchtitan.checkpoint.decision import decide, resolved_config

    config = facts.config
    try:
        decision = decide(config, facts, Path(config.job.dump_folder).resolve())
    except ConfigError as error:
        return error.problems
    if decision.action == "finished" or (decision.action == "new" and not decision.step):
        return []
    return preflight(replace(facts, config=resolved_config(config, decision)), [ARITHMETIC])


def data_problems(facts: Facts) -> list[Problem]:
    """Compare data, tokenizer and cutting with those of the run that a start goes on with. The
    data's files are opened; what keeps them from being read is told by other phases."""
    from torchtitan.checkpoint import data_check
    from torchtitan.checkpoint.decision import decide, resolved_config
    from torchtitan.checkpoint.manifest import InvalidCheckpoint

    config = facts.config
    try:
        decision = decide(config, facts, Path(config.job.dump_folder).resolve())
        config = resolved_config(config, decision)
        state = data_check.stored_state(config, decision)
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
    return data_check.data_problems(config.checkpoint, state, fingerprint, compare)


def report(problems: Iterable[Problem], quiet: bool = False) -> None:
    """Print each problem once to stderr; `quiet` is for the ranks that see what rank 0 prints."""
    if quiet:
        return
    for problem in problems:
        print(f"{problem.severity}: {problem}", file=sys.stderr)


def require(facts: Facts, phases: Sequence[str] = PHASES, quiet: bool = False) -> list[Problem]:
    """Run the phases, print the warnings and return them; raise `ConfigError` with the errors."""
    problems = preflight(facts, phases)
    errors = errors_of(problems)
    warnings = [problem for problem in problems if problem not in errors]
    report(warnings, quiet)
    if errors:
        raise ConfigError(errors)
    return warnings


def require_same_data(facts: Facts) -> None:
    """Raise `ConfigError` unless a start goes on with the data that its checkpoint knows."""
    problems = data_problems(facts)
    if problems:
        raise ConfigError(problems)


def _function(module: str, name: str) -> Callable[[Facts], list[Problem]]:
    """The module is imported when it is asked, because some probes need torch."""
    return getattr(importlib.import_module(module), name)


def _naming_the_other_place(problem: Problem, facts: Facts) -> Problem:
    """A relative path starts where the process does, and may be meant to start elsewhere."""
    text = problem.value if problem.missing_asset and isinstance(problem.value, str) else ""
    place = found_elsewhere(text, facts.config.job.config_file)
    if place is None:
        return problem
    fix = f"{problem.fix.rstrip('.')}; did you mean {place}? A relative path starts in the current"
    return replace(problem, fix=f"{fix} folder, {Path.cwd()}")


def _downgraded(problem: Problem) -> Problem:
    """Away from the machine that will train, an absent file is worth a warning only."""
    if problem.missing_asset and problem.severity == "error":
        return replace(problem, severity="warning")
    return problem
