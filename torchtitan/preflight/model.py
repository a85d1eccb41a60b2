"""Problems of `[model]` that show before anything is read (`check`) or by building it (`probe`)."""

from torchtitan.config.errors import ConfigError, ConfigIssue
from torchtitan.config.run_context import RunContext
from torchtitan.models.registry import get_family
from torchtitan.models.spec import ModelArgs, ModelFamily

_STAND_IN_VOCAB_SIZE = 256


def check_static(context: RunContext) -> list[ConfigIssue]:
    """Unknown family, flavor or hyper-parameter, hyper-parameters that do not fit, `seq_len`.

    Whether the vocabulary fits is decided where the tokenizer is known: `ModelFamily.resolve`.
    """
    try:
        _, args = _resolve(context)
    except ConfigError as error:
        return error.problems
    seq_len = context.config.training.seq_len
    if seq_len <= args.max_seq_len:
        return []
    return [
        ConfigIssue(
            "training.seq_len",
            f"longer than model.args.max_seq_len = {args.max_seq_len}, which the model is made for",
            f"set it to at most {args.max_seq_len}, or raise model.args.max_seq_len (and, for a "
            "trained model, model.args.rope_scaling_factor)",
            value=seq_len,
        )
    ]


def check_environment(context: RunContext) -> list[ConfigIssue]:
    """Build the model without memory (on `meta`); imports torch. For what `check` lets pass."""
    try:
        family, args = _resolve(context)
    except ConfigError:
        return []  # reported by `check`
    import torch

    if args.vocab_size is None:
        args = args.model_copy(update={"vocab_size": _STAND_IN_VOCAB_SIZE})
    try:
        with torch.device("meta"):
            family.build(args)
    except Exception as error:
        model = context.config.model
        problem = f"the model cannot be built: {type(error).__name__}: {error}"
        return [
            ConfigIssue("model.args", problem, "change these hyper-parameters", value=model.args)
        ]
    return []


def _resolve(context: RunContext) -> tuple[ModelFamily, ModelArgs]:
    model = context.config.model
    family = get_family(model.name)
    return family, family.resolve(model)
