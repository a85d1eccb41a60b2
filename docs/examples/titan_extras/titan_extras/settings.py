"""What a config may set. No torch, so that checking a config stays quick."""

from typing import Annotated

from pydantic import Field

from torchtitan.config.registry import lazily
from torchtitan.config.schema import PositiveInt, Section
from torchtitan.handlers.registry import HandlerEntry
from torchtitan.loss.registry import LossEntry
from torchtitan.optim.registry import OptimizerEntry

Share = Annotated[float, Field(ge=0, lt=1)]


class ReluSquaredSettings(Section):
    every: PositiveInt = 1
    """Change each n-th block only, counted from the first."""


class PolyLossSettings(Section):
    epsilon: float = 1.0
    """Times 1 - p of the right token is added to the cross entropy; 0 is the cross entropy."""


class LionSettings(Section):
    beta1: Share = 0.9
    """Of the average of gradients, in the direction of a step."""

    beta2: Share = 0.99
    """Of the average of gradients that is kept."""


RELU_SQUARED = HandlerEntry(
    ReluSquaredSettings,
    lazily("titan_extras.relu_squared:ReluSquared"),
    after=(),
    excludes=(),
)
POLY_LOSS = LossEntry(
    PolyLossSettings, lazily("titan_extras.poly_loss:PolyLoss"), supports_vocab_parallel=True
)
LION = OptimizerEntry(LionSettings, lazily("titan_extras.lion:build"))
