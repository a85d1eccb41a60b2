"""Checks of `[evaluation]`. No torch."""

from dataclasses import replace

from torchtitan.config.errors import ConfigError, ConfigIssue
from torchtitan.config.run_context import RunContext
from torchtitan.data.chat_template import read_chat_template
from torchtitan.data.tokenizers import TOKENIZERS
from torchtitan.evaluation.tasks import chosen_tasks, find_tasks, missing_package
from torchtitan.weights.tokenizer_files import folder_of_tokenizer


def check_environment(context: RunContext) -> list[ConfigIssue]:
    """Check that lm-eval is installed and knows the tasks, and that there is a chat template.

    Loads no task.
    """
    choice = chosen_tasks(context.config.evaluation)
    if not choice.names:
        return []
    if (missing := missing_package(choice.key, ",".join(choice.names))) is not None:
        return [missing]
    issues = []
    try:
        find_tasks(choice)
    except ConfigError as error:
        # The folder may be on the training machine only.
        issues += [replace(p, missing_asset=p.key == choice.dir_key) for p in error.problems]
    if choice.apply_chat_template:
        path = context.config.model.tokenizer_path
        folder = folder_of_tokenizer(path)
        is_elsewhere = path.partition(":")[0] not in TOKENIZERS and not folder.is_dir()
        try:
            read_chat_template([folder])
        except ConfigError as error:
            issues += [replace(p, missing_asset=is_elsewhere) for p in error.problems]
    return issues
