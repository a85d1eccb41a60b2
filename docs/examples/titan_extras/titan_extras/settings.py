"""What a config may set. No torch, so that checking a config stays quick."""

from torchtitan.config.section import PositiveInt, Section
from torchtitan.handlers.registry import HandlerEntry, lazily


class ReluSquaredSettings(Section):
    every: PositiveInt = 1
    """Change each n-th block only, counted from the first."""


RELU_SQUARED = HandlerEntry(
    ReluSquaredSettings,
    lazily("titan_extras.relu_squared:ReluSquared"),
    after=(),
    excludes=(),
)
