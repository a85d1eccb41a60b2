"""PolyLoss (https://arxiv.org/abs/2204.12511): cross entropy and a multiple of its first term."""

import torch.nn.functional as F
from torch import Tensor

from titan_extras.settings import PolyLossSettings
from torchtitan.loss.chunked import ChunkedLoss


class PolyLoss(ChunkedLoss):
    """The loss `poly`. Chunks, gradients, and a vocabulary that is cut over ranks are the base
    class's to look after."""

    Settings = PolyLossSettings

    def token_losses(self, logits: Tensor, labels: Tensor) -> Tensor:  # [n, V], [n] -> [n]
        losses = F.cross_entropy(logits, labels, reduction="none")
        return losses + self.settings.epsilon * (1 - (-losses).exp())
