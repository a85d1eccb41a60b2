"""Problems of `[model]` that show before anything is read (`check`) or by building it (`probe`)."""

from torchtitan.config.errors import ConfigError, Problem
from torchtitan.config.facts import Facts
from torchtitan.models.registry import get_family
from torchtitan.models.spec import ModelArgs, ModelFamily

_STAND_IN_VOCAB_SIZE = 256


def check(facts: Facts) -> list[Problem]:
    """Unknown family, flavor or hyper-parameter, hyper-parameters that do not fit, `seq_len`.

    Whether the vocabulary fits is decided where the tokenizer is known: `ModelFamily.resolve`.
    """
    try:
        _, args = _resolve(facts)
    except ConfigError as error:
        return error.problems
    seq_len = facts.config.training.seq_len
    if seq_len <= args.max_seq_len:
        return []
    return [
        Problem(
            "training.seq_len",
            f"longer than model.args.max_seq_len = {args.max_seq_len}, which the model is made for",
            f"set it to at most {args.max_seq_len}, or raise model.args.max_seq_len (and, for a "
            "trained model, model.args.rope_scaling_factor)",
            value=seq_len,
        )
    ]


def probe(facts: Facts) -> list[Problem]:
    """Build the model without memory (on `meta`); imports torch. For what `check` lets pass."""
    try:
        family, args = _resolve(facts)
    except ConfigError:
        return []  # reported by `check`
    import torch

    if args.vocab_size is None:
        args = args.model_copy(update={"vocab_size": _STAND_IN_VOCAB_SIZE})
    try:
        with torch.device("meta"):
            family.build(args)
    except Exception as error:
        model = facts.config.model
        problem = f"the model cannot be built: {type(error).__name__}: {error}"
        return [Problem("model.args", problem, "change these hyper-parameters", value=model.args)]
    return []


def model_args(facts: Facts) -> ModelArgs | None:
    """The model's hyper-parameters, for other checks; None where `check` has something to say."""
    try:
        return _resolve(facts)[1]
    except ConfigError:
        return None


def _resolve(facts: Facts) -> tuple[ModelFamily, ModelArgs]:
    model = facts.config.model
    family = get_family(model.name)
    return family, family.resolve(model)
