"""Settings of the handler `bitnet`, and what can be wrong with them. No torch."""

from collections.abc import Iterator

from torchtitan.config.errors import Problem
from torchtitan.config.facts import Facts
from torchtitan.handlers.linear_settings import LinearSettings, no_float64
from torchtitan.handlers.protocol import no_problems


class Settings(LinearSettings):
    """Which linears have ternary weights."""


def check(facts: Facts, settings: Settings) -> Iterator[Problem]:
    """A weight has one scale, the mean of its magnitudes."""
    yield from no_float64(facts, "bitnet")
    degree = facts.config.parallelism.tensor_parallel_degree
    if degree > 1:
        problem = (
            "the handler bitnet gives a matrix one scale, the mean of its magnitudes, and the parts"
            " of a cut matrix would each have another: the model would depend on the mesh"
        )
        fix = "set it to 1, and use data or pipeline parallelism"
        yield Problem("parallelism.tensor_parallel_degree", problem, fix, degree)


probe = no_problems
