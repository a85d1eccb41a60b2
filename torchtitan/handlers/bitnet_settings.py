"""Settings of the handler `bitnet`, and what can be wrong with them. No torch."""

from collections.abc import Iterator

from torchtitan.config.errors import ConfigIssue
from torchtitan.config.run_context import RunContext
from torchtitan.handlers.linear_settings import LinearSettings, no_float64
from torchtitan.handlers.protocol import no_problems


class Settings(LinearSettings):
    """Which linears have ternary weights."""


def check(context: RunContext, settings: Settings) -> Iterator[ConfigIssue]:
    """Its products come out in types of at most 32 bits."""
    yield from no_float64(context, "bitnet")


probe = no_problems
