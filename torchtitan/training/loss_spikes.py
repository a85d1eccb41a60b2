"""Loss spikes: a loss far above those of the steps before it, by a robust z-score.

The score is the distance from the median of a window of losses, in units of their median absolute
deviation scaled to a standard deviation, so that spikes within the window hardly move either. All
of it stays on the device.
"""

from collections.abc import Sequence

import torch
from torch import Tensor

_STANDARD_DEVIATION = 1.4826
"""Standard deviation of a normal distribution over its median absolute deviation."""


class LossSpikes:
    """Scores each loss against the finite ones before it."""

    def __init__(
        self,
        threshold: float,
        window: int,
        device: torch.device,
        recent: Sequence[float] | None = None,
        skips: bool = False,
    ):
        """`threshold`: a score above it is a spike; `recent`: losses before the first, in order.

        `skips`: the update of a spike is left out.
        """
        self.threshold = threshold
        self.skips = skips
        self._losses = torch.full((window,), torch.nan, dtype=torch.float64, device=device)
        self._places = torch.arange(window, device=device)
        recent = (recent or ())[-window:]
        self._losses[: len(recent)] = torch.tensor(recent, dtype=torch.float64)
        self._next = torch.tensor(len(recent), device=device)

    @property
    def recent(self) -> list[float]:
        """The losses in the window, oldest first. Waits for the device."""
        ordered = self._losses.roll(-int(self._next) % len(self._losses))
        return [loss for loss in ordered.tolist() if loss == loss]

    def score(self, loss: Tensor) -> Tensor:
        """Return the score of `loss`, a float64 scalar, and take it into the window if finite.

        0 until half of the window is filled, and for a loss that is not finite.
        """
        loss = loss.detach().double()
        median = self._median(self._losses)
        deviation = self._median((self._losses - median).abs()) * _STANDARD_DEVIATION
        # Losses that are all equal have no deviation: then rounding is the measure.
        smallest = median.abs() * torch.finfo(torch.float32).eps
        score = (loss - median) / deviation.maximum(smallest)
        is_known = self._next >= len(self._losses) // 2
        is_finite = loss.isfinite()
        # An index that lies on the device would make the host wait for it.
        is_next = self._places == self._next % len(self._losses)
        self._losses = torch.where(is_next & is_finite, loss, self._losses)
        self._next += is_finite
        return torch.where(is_finite & is_known & score.isfinite(), score, 0.0)

    def _median(self, values: Tensor) -> Tensor:
        """Return the lower median of `values` `[window]`, which are NaN where no loss is known.

        On CUDA `nanmedian` makes the host wait.
        """
        middle = (self._next.clamp(1, len(values)) - 1) // 2
        return values.sort().values.gather(0, middle.view(1)).squeeze(0)
