"""What can be wrong with the settings of tensor parallelism. No torch."""

from torchtitan.config.errors import Problem
from torchtitan.config.facts import Facts


def check(facts: Facts) -> list[Problem]:
    """Problems of `parallelism.tensor_parallel_*`."""
    degree = facts.config.parallelism.tensor_parallel_degree
    if degree == 1:
        return []
    problem = "is not available in this version"
    return [Problem("parallelism.tensor_parallel_degree", problem, "set it to 1", degree)]
