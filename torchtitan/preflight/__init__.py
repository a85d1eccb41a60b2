"""Find everything that is wrong with a run before it starts.

Each module here checks one subject: `check_static(context)` by arithmetic on the config, without
torch; `check_environment(context)` by looking at files, devices or the run folder;
`check_model(context, model)` on the model, which is built once, on the meta device. All issues are
collected, so that a user reads them at once instead of one per attempt.
"""

import sys
from collections.abc import Iterable, Sequence
from dataclasses import replace
from functools import partial
from pathlib import Path

from torchtitan.config.errors import ConfigError, ConfigIssue, DataError, errors_of
from torchtitan.config.run_context import RunContext
from torchtitan.config.shipped import found_elsewhere
from torchtitan.preflight import (
    checkpoint,
    context_parallel,
    data,
    evaluation,
    frozen_model,
    handlers,
    hardware,
    memory,
    mesh,
    model,
    optim,
    outputs,
    pipeline_parallel,
    pretrained,
    remote,
    sharding,
    tensor_parallel,
    validation,
)

ARITHMETIC = "arithmetic"
"""Config and world size alone: no torch, no file."""
FILES = "files"
"""The tokenizer, the data, the folders. Only rank 0 needs it."""
HARDWARE = "hardware"
"""This machine's devices, for `context.full` only. Imports torch."""
MODEL = "model"
"""The model on the meta device. Imports torch."""
CHECKPOINTS = "checkpoints"
"""The present content of the run folder. No torch."""
PHASES = (ARITHMETIC, FILES, HARDWARE, MODEL, CHECKPOINTS)

STATIC = (
    mesh,
    model,
    tensor_parallel,
    context_parallel,
    pipeline_parallel,
    memory,
    data,
    validation,
    optim,
    frozen_model,
    outputs,
    handlers,
    checkpoint,
    remote,
)
"""Modules with `check_static`, in the order of their issues."""
ENVIRONMENT = {
    FILES: (pipeline_parallel, data, validation, evaluation, optim, frozen_model, outputs),
    HARDWARE: (hardware, handlers),
    CHECKPOINTS: (checkpoint, remote, pretrained),
}
"""Modules with `check_environment`, by phase."""


def preflight(context: RunContext, phases: Sequence[str] = PHASES) -> list[ConfigIssue]:
    """Return the issues of the given phases, warnings included, each once.

    A subject with static errors is not looked at further, and nothing is on a mesh that does not
    exist.
    """
    on_this_machine = partial(_on_this_machine, context=context)
    issues: list[ConfigIssue] = []
    broken = set()
    for subject in STATIC:
        found = subject.check_static(context)
        if errors_of(found):
            broken.add(subject)
        if ARITHMETIC in phases:
            issues += found
    for phase in phases if mesh not in broken else ():
        if phase == MODEL and model not in broken:
            issues += _check_model(context, with_handlers=handlers not in broken)
        for subject in ENVIRONMENT.get(phase, ()):
            if subject not in broken and (phase != HARDWARE or context.full):
                found = subject.check_environment(context)
                if phase == CHECKPOINTS:  # a wrong value differs from the stored run's, too
                    wrong = {i.key for i in errors_of(map(on_this_machine, issues))}
                    found = [issue for issue in found if issue.key not in wrong]
                issues += found
    if {CHECKPOINTS, MODEL} <= set(phases) and context.full and not errors_of(issues):
        issues += check_same_data(context)
    return list(map(on_this_machine, {str(issue): issue for issue in issues}.values()))


def _check_model(context: RunContext, with_handlers: bool) -> list[ConfigIssue]:
    try:
        built = model.build_on_meta(context)
    except ConfigError as error:
        return error.problems
    issues = optim.check_model(context, built) + checkpoint.check_model(context, built)
    if with_handlers:
        issues += handlers.check_model(context, built)
        issues += sharding.check_model(context, built)  # the last: it converts the model
    return issues


def check_same_data(context: RunContext) -> list[ConfigIssue]:
    """Compare data, tokenizer and packing with those of the run that is resumed.

    Opens the data files. Files that cannot be read are reported by other phases.
    """
    from torchtitan.checkpoint import stored_run
    from torchtitan.checkpoint.decision import decide, resolved_config
    from torchtitan.checkpoint.manifest import InvalidCheckpoint
    from torchtitan.data import identity, loader
    from torchtitan.data.tokenizers import build_tokenizer

    config = context.config
    try:
        decision = decide(config, context, Path(config.job.dump_folder).resolve())
        config = resolved_config(config, decision)
        state = stored_run.stored_state(config, decision)
        if state.get("data_fingerprint") is None:
            return []
        tokenizer = build_tokenizer(config.model.tokenizer_path)
        mixture = loader.build_mixture(
            config.training, config.data, config.debug.seed, tokenizer, decision.num_lanes
        )
        now = loader.data_facts(mixture)  # reads the files
    except (ConfigError, DataError, InvalidCheckpoint):
        return []
    if identity.names_data(state["data_fingerprint"], now):
        return []
    compare = partial(identity.differences, now=identity.summary_of(now), anew=config.data.restart)
    fingerprint = identity.fingerprint_of(now)
    return stored_run.data_problems(config.checkpoint, state, fingerprint, compare)


def report(issues: Iterable[ConfigIssue], quiet: bool = False) -> None:
    """Print each issue once to stderr; `quiet` is for ranks that see what rank 0 prints."""
    for issue in () if quiet else issues:
        print(f"{issue.severity}: {issue}", file=sys.stderr)


def require(
    context: RunContext, phases: Sequence[str] = PHASES, quiet: bool = False
) -> list[ConfigIssue]:
    """Run the phases, print the warnings and return them; raise `ConfigError` with the errors."""
    issues = preflight(context, phases)
    warnings = [issue for issue in issues if issue.severity != "error"]
    report(warnings, quiet)
    if len(warnings) < len(issues):
        raise ConfigError(errors_of(issues))
    return warnings


def _on_this_machine(issue: ConfigIssue, context: RunContext) -> ConfigIssue:
    """Name the place where an absent file may be meant to be; without `full` it is a warning."""
    if not issue.missing_asset:
        return issue
    severity = issue.severity if context.full else "warning"
    text = issue.value if isinstance(issue.value, str) else ""
    place = found_elsewhere(text, context.config.job.config_file)
    if place is None:
        return replace(issue, severity=severity)
    fix = f"{issue.fix.rstrip('.')}; did you mean {place}? A relative path starts in the current"
    return replace(issue, severity=severity, fix=f"{fix} folder, {Path.cwd()}")
