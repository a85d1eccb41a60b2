"""Settings of handlers that only the built model can judge, such as names of parameters."""

from torchtitan.config.errors import ConfigError, ConfigIssue, errors_of
from torchtitan.config.registry import BUILT_IN
from torchtitan.config.run_context import RunContext
from torchtitan.models.registry import get_family

_STAND_IN_VOCAB_SIZE = 256


def check_environment(context: RunContext) -> list[ConfigIssue]:
    """Ask the handlers that have a `check_static(model)`, of the model on `meta`; imports torch.

    For configs whose `[model]` and handlers are sound; with others it has nothing to say. Nor of
    what comes after somebody's own handler, which may add modules and parameters: those handlers
    judge when the model is built.
    """
    from torchtitan.distributed.parallel_dims import ParallelDims
    from torchtitan.handlers.named import NamedHandler
    from torchtitan.handlers.registry import HANDLERS
    from torchtitan.preflight.handlers import check_static

    config = context.config
    if not config.model.handlers or errors_of(check_static(context)):
        return []
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
    dims = ParallelDims.from_section(context.config.parallelism, context.world_size)
    problems: list[ConfigIssue] = []
    for name in config.model.handlers:
        problems += NamedHandler(name, config, dims).check(model)
        if HANDLERS.origin(name) != BUILT_IN:
            break
    return problems
