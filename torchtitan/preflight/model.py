"""Checks of `[model]`, and the model on the meta device for the checks that need it."""

from typing import TYPE_CHECKING

from torchtitan.config.errors import ConfigError, ConfigIssue
from torchtitan.config.run_context import RunContext
from torchtitan.models.family import ModelFamily
from torchtitan.models.registry import get_family
from torchtitan.models.spec import ModelArgs

if TYPE_CHECKING:
    from torch import nn

UNKNOWN_VOCAB_SIZE = 5_765_760
"""Stands for the size that only the tokenizer knows: divisible by usual degrees, like no other."""


def check_static(context: RunContext) -> list[ConfigIssue]:
    """Check family, flavor, hyper-parameters and `training.seq_len`.

    `ModelFamily.resolve` checks the vocabulary where the tokenizer is known.
    """
    try:
        _, args = _resolve(context)
    except ConfigError as error:
        return error.problems
    seq_len = context.config.training.seq_len
    if seq_len <= args.max_seq_len:
        return []
    text = f"longer than model.args.max_seq_len = {args.max_seq_len}, which the model is made for"
    fix = f"set it to at most {args.max_seq_len}, or raise that (with rope_scaling_factor)"
    return [ConfigIssue("training.seq_len", text, fix, seq_len)]


def build_on_meta(context: RunContext) -> "nn.Module":
    """Return the model without memory, before handlers; imports torch.

    Raises:
        ConfigError: `check_static` has errors, or the model cannot be built.
    """
    family, args = _resolve(context)
    import torch

    from torchtitan.utils.dtypes import default_dtype, torch_dtype

    try:
        with torch.device("meta"), default_dtype(torch_dtype(context.config.training.dtype)):
            return family.build(args)
    except Exception as error:
        text = f"the model cannot be built: {type(error).__name__}: {error}"
        value = context.config.model.args
        issue = ConfigIssue("model.args", text, "change these hyper-parameters", value=value)
        raise ConfigError(issue) from error


def _resolve(context: RunContext) -> tuple[ModelFamily, ModelArgs]:
    """Return the family, and the hyper-parameters with some size of the vocabulary."""
    section = context.config.model
    family = get_family(section.name)
    args = family.resolve(section)
    vocab_size = args.vocab_size or UNKNOWN_VOCAB_SIZE
    return family, args.model_copy(update={"vocab_size": vocab_size})
