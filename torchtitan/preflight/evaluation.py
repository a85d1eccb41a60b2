"""Checks of `[evaluation]`. No torch."""

from dataclasses import replace

from torchtitan.config.errors import ConfigError, ConfigIssue
from torchtitan.config.run_context import RunContext
from torchtitan.evaluation.tasks import chosen_tasks, find_tasks, missing_package


def check_environment(context: RunContext) -> list[ConfigIssue]:
    """Check that lm-eval is installed and knows the tasks; loads none of them."""
    choice = chosen_tasks(context.config.evaluation)
    if not choice.names:
        return []
    if (missing := missing_package(choice.key, ",".join(choice.names))) is not None:
        return [missing]
    try:
        find_tasks(choice)
    except ConfigError as error:
        # The folder may be on the training machine only.
        return [replace(p, missing_asset=p.key == choice.dir_key) for p in error.problems]
    return []
