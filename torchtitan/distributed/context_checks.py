"""What can be wrong with the settings of context parallelism. No torch."""

from torchtitan.config.errors import Problem
from torchtitan.config.facts import Facts


def check(facts: Facts) -> list[Problem]:
    """Problems of `parallelism.context_parallel_*`."""
    degree = facts.config.parallelism.context_parallel_degree
    if degree == 1:
        return []
    problem = "is not available in this version"
    return [Problem("parallelism.context_parallel_degree", problem, "set it to 1", degree)]
