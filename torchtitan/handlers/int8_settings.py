"""Settings of the handler `int8`, and what can be wrong with them. No torch."""

from collections.abc import Iterator

from torchtitan.config.errors import ConfigIssue
from torchtitan.config.run_context import RunContext
from torchtitan.handlers.linear_settings import LinearSettings, no_float64, whole_blocks
from torchtitan.handlers.protocol import no_problems

MULTIPLE = 16


class Settings(LinearSettings):
    """Which products of linears are of integers."""

    output: bool = True
    """The output, of input and weight."""

    grad_input: bool = True
    """The gradient of the input, of the output's gradient and the weight."""

    grad_weight: bool = True
    """The gradient of the weight, of the output's gradient and the input; the one in which rounding
    costs most."""


def check(context: RunContext, settings: Settings) -> Iterator[ConfigIssue]:
    """Problems of the settings together, and with the batch."""
    yield from no_float64(context, "int8")
    if not (settings.output or settings.grad_input or settings.grad_weight):
        problem = "no product of it is one of integers"
        fix = 'set handlers.int8.output to true, or take "int8" out'
        yield ConfigIssue("model.handlers", problem, fix, "int8")
    if settings.grad_weight:
        yield from whole_blocks(context, "int8", MULTIPLE, "integer units take that many at once")


probe = no_problems
