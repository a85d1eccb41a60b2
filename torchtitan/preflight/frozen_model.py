"""Checks of losses over pairs, and of the frozen models that losses compare with."""

from collections.abc import Iterator
from contextlib import suppress
from dataclasses import replace
from pathlib import Path
from typing import Any

from torchtitan.config.errors import ConfigError, ConfigIssue
from torchtitan.config.run_context import RunContext
from torchtitan.data.named_sources import named_sources, validation_sets
from torchtitan.handlers.registry import HANDLERS
from torchtitan.loss.registry import (
    LOSSES,
    DistillationSettings,
    DPOSettings,
    LossEntry,
    loss_settings,
)
from torchtitan.models.registry import get_family
from torchtitan.preflight.folders import check_writable
from torchtitan.utils.remote import is_remote
from torchtitan.weights.recognise import kind_of

_PAIRS = "preference"
_TEACHER = "loss.args.teacher_path"


def check_static(context: RunContext) -> list[ConfigIssue]:
    """Check data and settings of the loss; other modules check its name and arguments."""
    section = context.config.loss
    settings = _settings(context)
    if settings is None:
        return []
    issues = list(_pairs(context, LOSSES[section.name]))
    if isinstance(settings, DPOSettings):
        issues += _reference(context, settings)
    if isinstance(settings, DistillationSettings):
        issues += _weights(_TEACHER, settings.teacher_path)
    return issues


def check_environment(context: RunContext) -> list[ConfigIssue]:
    """Compare the teacher's vocabulary, tokenizer and sizes with the model's and the mesh.

    Check that what is computed of a reference can be written.
    """
    settings = _settings(context)
    if isinstance(settings, DPOSettings) and (cache := settings.reference_cache) is not None:
        return check_writable("loss.args.reference_cache", Path(cache), cache)
    if not isinstance(settings, DistillationSettings) or settings.teacher_path is None:
        return []
    if is_remote(settings.teacher_path) or not Path(settings.teacher_path).exists():
        return []  # compared when it has been downloaded
    return list(_teacher(context, settings, Path(settings.teacher_path)))


def _settings(context: RunContext) -> Any:
    """Return the settings of the loss; None if they are not valid."""
    section = context.config.loss
    with suppress(ConfigError):
        if LOSSES.get(section.name) is not None:
            return loss_settings(section)
    return None


def _pairs(context: RunContext, entry: LossEntry) -> Iterator[ConfigIssue]:
    """Check that a loss of pairs gets pairs, and no other loss does."""
    config = context.config
    name = config.loss.name
    for named in [*named_sources(config.training, config.data), *validation_sets(config)]:
        has_pairs = named.data.format == _PAIRS
        if has_pairs == entry.reads_pairs or (has_pairs and name == "cross_entropy"):
            continue  # the last is reported by the check of the data
        problem = f"the loss {name} compares two answers, and these data have one"
        fix = f'set it to "{_PAIRS}", for rows with a chosen and a rejected answer'
        if has_pairs:
            problem = f"the loss {name} would train on the rejected answers, too"
            fix = "choose a loss over pairs, such as dpo, or another format"
        yield named.under_own_key(ConfigIssue("data.format", problem, fix, named.data.format))


def _reference(context: RunContext, settings: DPOSettings) -> Iterator[ConfigIssue]:
    if not settings.needs_reference:
        return
    if settings.reference == "base":
        entries = [HANDLERS.get(name) for name in context.config.model.handlers]
        if not any(entry is not None and entry.adds_adapters for entry in entries):
            problem = "no handler in model.handlers adds adapters, so there is no base below them"
            fix = 'add one that does, or set it to "start"'
            yield ConfigIssue("loss.args.reference", problem, fix, settings.reference)
    yield from _weights("loss.args.reference_path", settings.reference_path)


def _weights(key: str, path: str | None) -> Iterator[ConfigIssue]:
    """Check that a path holds weights."""
    if path is None or is_remote(path) or kind_of(Path(path)) is not None:
        return
    exists = Path(path).exists()
    problem = "is no checkpoint" if exists else "does not exist"
    fix = "name a step, a Hugging Face folder, Meta's or a GGUF"
    yield replace(ConfigIssue(key, problem, fix, path), missing_asset=not exists)


def _teacher(
    context: RunContext, settings: DistillationSettings, path: Path
) -> Iterator[ConfigIssue]:
    from torchtitan.data.tokenizers import build_tokenizer
    from torchtitan.training.pretrained_config import tokenizer_of
    from torchtitan.weights.description import describe_model

    config, given = context.config, settings.teacher_path
    try:
        args = describe_model(path).resolved()
        tokenizer = build_tokenizer(config.model.tokenizer_path)
        own = get_family(config.model.name).resolve(config.model, tokenizer.vocab_size)
    except ConfigError as error:  # those of the model and the tokenizer are reported twice
        yield from error.problems
        return
    fix = "choose a teacher with the same tokenizer"
    if args.vocab_size is not None and args.vocab_size != own.vocab_size:
        text = f"has a vocabulary of {args.vocab_size} tokens, and the model of {own.vocab_size}"
        yield ConfigIssue(_TEACHER, text, fix, given)
        return
    with suppress(ConfigError):  # weights without a tokenizer
        theirs = tokenizer_of(path)
        if theirs is not None and build_tokenizer(theirs).fingerprint != tokenizer.fingerprint:
            text = f"was trained with another tokenizer, {theirs}"
            yield ConfigIssue(_TEACHER, text, fix, given)
    if settings.top_k is not None and settings.top_k > (own.vocab_size or settings.top_k):
        text = f"is more than the {own.vocab_size} tokens of the vocabulary"
        fix = "lower it, or leave it out to compare the whole vocabulary"
        yield ConfigIssue("loss.args.top_k", text, fix, settings.top_k)
    degree = config.parallelism.tensor_parallel_degree
    for issue in args.tensor_parallel_problems(degree) if degree > 1 else ():
        yield replace(issue, problem=f"of the teacher {path}: {issue.problem}")
