"""Checks of chat data: the settings, the template, and the first rows as they are trained."""

from collections.abc import Iterator
from typing import TYPE_CHECKING

from torchtitan.config.errors import ConfigError, ConfigIssue, warning
from torchtitan.config.run_context import RunContext
from torchtitan.config.schema import Data
from torchtitan.config.suggest import did_you_mean
from torchtitan.data.chat_formats import COLUMNS, MESSAGE_KEYS, ROLES
from torchtitan.data.named_sources import named_sources, validation_sets
from torchtitan.preflight.context_parallel import sequence_divisor

if TYPE_CHECKING:
    from torchtitan.data.chat_encoder import ChatEncoder
    from torchtitan.data.tokenizers import Tokenizer

_CHAT_KEYS = ("columns", "roles", "chat_template", "train_on", "on_long", "packing")
"""Settings that mean nothing for text."""


def check_rows_of(data: Data) -> list[ConfigIssue]:
    """Check the settings that say what the rows of one dataset hold; under a dataset's keys."""
    if data.format == "text":
        return []
    issues = []
    known = (*COLUMNS[data.format], *MESSAGE_KEYS)
    for name in data.columns:
        if name not in known:
            problem = f"is not a column of format {data.format!r}"
            fix = did_you_mean(name, known)
            issues.append(ConfigIssue(f"data.columns.{name}", problem, fix, data.columns[name]))
    for name, role in data.roles.items():
        if role not in ROLES:
            key = f"data.roles.{name}"
            issues.append(ConfigIssue(key, "is not a role", did_you_mean(role, ROLES), role))
    if data.format == "preference" and data.on_long == "split":
        fix = "cut it (truncate_left, truncate_right) or drop it"
        issues.append(ConfigIssue("data.on_long", "a pair cannot be split", fix, data.on_long))
    return issues


def check_chat(context: RunContext) -> Iterator[ConfigIssue]:
    """Check the settings of chat data that all datasets share."""
    config = context.config
    data, training = config.data, config.training
    formats = {named.data.format for named in named_sources(training, data)}
    formats |= {named.data.format for named in validation_sets(config)}
    if formats == {"text"}:
        for name in _CHAT_KEYS:
            if getattr(data, name) != Data().model_dump()[name]:
                fix = 'set data.format to "chat", "instruct" or "preference", or remove it'
                yield ConfigIssue(
                    f"data.{name}", "has no meaning for text", fix, getattr(data, name)
                )
        return
    if "preference" in formats:
        if not training.document_mask:
            problem = "the two sides of a pair must not see each other"
            yield ConfigIssue("training.document_mask", problem, "remove it", False)
        if config.loss.name == "cross_entropy":
            problem = "trains on the rejected answers, too"
            fix = "set a loss over pairs (see `torchtitan list losses`), or another data.format"
            yield ConfigIssue("loss.name", problem, fix, config.loss.name)
    if not data.packing:
        yield from _check_padding(context)


def _check_padding(context: RunContext) -> Iterator[ConfigIssue]:
    config = context.config
    if config.parallelism.pipeline_parallel_degree > 1:
        problem = "pipeline parallelism needs batches of one length"
        yield ConfigIssue("data.packing", problem, "set it to true", False)
    divisor, multiple = sequence_divisor(context), config.data.pad_to_multiple
    if multiple % divisor:
        problem = f"is not a multiple of {divisor}, which the mesh needs"
        fix = f"set it to {divisor * -(-multiple // divisor)}"
        yield ConfigIssue("data.pad_to_multiple", problem, fix, multiple)


def open_encoder(context: RunContext, data: Data) -> tuple["ChatEncoder | None", list[ConfigIssue]]:
    """Return the encoder of a dataset's rows with warnings about it; None if it has errors."""
    from torchtitan.data.chat_encoder import chat_encoder
    from torchtitan.data.tokenizers import build_tokenizer

    config = context.config
    try:
        tokenizer = build_tokenizer(config.model.tokenizer_path)
    except ConfigError:  # reported by the check of the tokenizer
        return None, []
    try:
        encoder = chat_encoder(config.training, data, tokenizer)
        assert encoder is not None
        return encoder, list(_check_ends(encoder, tokenizer, data))
    except ConfigError as error:
        return None, error.problems


def _check_ends(
    encoder: "ChatEncoder", tokenizer: "Tokenizer", data: Data
) -> Iterator[ConfigIssue]:
    try:
        end = encoder.template.end_of_turn(tokenizer)
    except ConfigError:  # for other conversations; the first rows will tell
        return
    if end is None:
        problem = (
            "the template ends the assistant's turns without a special token of the tokenizer: the"
            " model will not learn where to stop"
        )
        fix = "use the template of the model's family, or name the end token in the tokenizer"
        yield warning("data.chat_template", problem, fix, data.chat_template)
