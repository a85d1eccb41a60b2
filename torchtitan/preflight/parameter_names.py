"""Settings of the optimizer that only the built model can judge: names of parameters."""

from torchtitan.config.errors import ConfigError, ConfigIssue
from torchtitan.config.run_context import RunContext
from torchtitan.models.registry import get_family
from torchtitan.optim.registry import OPTIMIZERS, check_patterns, optimizer_settings

_STAND_IN_VOCAB_SIZE = 256


def check_environment(context: RunContext) -> list[ConfigIssue]:
    """Build the model without memory (on `meta`) and match its names; imports torch.

    For configs whose `[model]` is sound; with others it has nothing to say.
    """
    config = context.config
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
    shapes = {name: tuple(tensor.shape) for name, tensor in model.named_parameters()}
    problems = check_patterns(config.optimizer, list(shapes))
    try:
        entry = OPTIMIZERS.get(config.optimizer.name)
        if entry is not None and entry.check_names is not None:
            problems += entry.check_names(optimizer_settings(config.optimizer), shapes)
    except ConfigError:
        pass  # reported by `check`
    return problems
