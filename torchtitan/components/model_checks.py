"""Settings of the optimizer that only the built model can judge: names of parameters."""

from torchtitan.components.checks import check_patterns
from torchtitan.config.errors import ConfigError, Problem
from torchtitan.config.facts import Facts
from torchtitan.models.registry import get_family

_STAND_IN_VOCAB_SIZE = 256


def probe(facts: Facts) -> list[Problem]:
    """Build the model without memory (on `meta`) and match its names; imports torch.

    For configs whose `[model]` is sound; with others it has nothing to say.
    """
    config = facts.config
    try:
        family = get_family(config.model.name)
        args = family.resolve(config.model)
    except ConfigError:
        return []
    import torch

    if args.vocab_size is None:  # the tokenizer's; no name depends on it
        args = args.model_copy(update={"vocab_size": _STAND_IN_VOCAB_SIZE})
    with torch.device("meta"):
        model = family.build(args)
    return check_patterns(config.optimizer, [name for name, _ in model.named_parameters()])
