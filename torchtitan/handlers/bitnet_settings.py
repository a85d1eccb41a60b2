"""Settings of the handler `bitnet`, and what can be wrong with them. No torch."""

from collections.abc import Iterator

from torchtitan.config.errors import Problem
from torchtitan.config.facts import Facts
from torchtitan.handlers.linear_settings import LinearSettings, no_float64
from torchtitan.handlers.protocol import no_problems


class Settings(LinearSettings):
    """Which linears have ternary weights."""


def check(facts: Facts, settings: Settings) -> Iterator[Problem]:
    """Its products come out in types of at most 32 bits."""
    yield from no_float64(facts, "bitnet")


probe = no_problems
