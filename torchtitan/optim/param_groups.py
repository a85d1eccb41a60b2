"""The parameter groups of `optimizer.param_groups`: globs over full parameter names. No torch."""

from collections.abc import Sequence
from fnmatch import fnmatchcase

from torchtitan.config.errors import ConfigIssue
from torchtitan.config.schema import Optimizer

_DEFAULT_GROUPS = Optimizer.model_fields["param_groups"].default


def group_index(section: Optimizer, name: str) -> int:
    """Index of the first group whose pattern matches the parameter; their number if none does."""
    for index, group in enumerate(section.param_groups):
        if fnmatchcase(name, group.pattern):
            return index
    return len(section.param_groups)


def check_patterns(section: Optimizer, names: Sequence[str]) -> list[ConfigIssue]:
    """The groups of `optimizer.param_groups` that none of the model's parameters falls into. The
    default's may: not every model has norms with weights."""
    used = {group_index(section, name) for name in names}
    problems = []
    for index, group in enumerate(section.param_groups):
        if index in used:
            continue
        matches = [name for name in names if fnmatchcase(name, group.pattern)]
        if matches:
            problem = f"earlier patterns already take all it matches, such as {matches[0]}"
            fix = "list the narrower pattern first, or remove this group"
        elif group in _DEFAULT_GROUPS:
            continue
        else:
            problem = "it matches no parameter of the model"
            fix = f"use a glob over full names such as {_examples(names)}, or remove this group"
        key = f"optimizer.param_groups[{index}].pattern"
        problems.append(ConfigIssue(key, problem, fix, value=group.pattern))
    return problems


def _examples(names: Sequence[str]) -> str:
    """A few names, of different kinds: the last two parts of a name are its kind."""
    kinds: dict[str, str] = {}
    for name in names:
        kinds.setdefault(".".join(name.split(".")[-2:]), name)
    return ", ".join(list(kinds.values())[:4])
