"""What must hold of `[loss]`. No torch."""

from torchtitan.config import ConfigError, ConfigIssue
from torchtitan.config.run_context import RunContext
from torchtitan.config.suggest import fix_of_registered
from torchtitan.loss.registry import LOSSES, loss_settings


def check_static(context: RunContext) -> list[ConfigIssue]:
    """The name, the settings, and whether the loss goes with tensor parallelism."""
    section = context.config.loss
    if section.name not in LOSSES:
        fix = fix_of_registered(section.name, LOSSES)
        return [ConfigIssue("loss.name", "is not a loss", fix, value=section.name)]
    try:
        entry = LOSSES[section.name]
        loss_settings(section)
    except ConfigError as error:
        return error.problems
    degree = context.config.parallelism.tensor_parallel_degree
    if degree > 1 and not entry.supports_vocab_parallel:
        problem = (
            f"this loss needs the logits of all tokens, and a rank has those of a part of the"
            f" vocabulary with parallelism.tensor_parallel_degree = {degree}"
        )
        fix = "derive the loss from ChunkedLoss (docs/losses.md), or set the degree to 1"
        return [ConfigIssue("loss.name", problem, fix, value=section.name)]
    return []
