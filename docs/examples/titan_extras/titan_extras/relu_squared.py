"""A feed-forward with squared ReLU in place of SiLU (Primer, https://arxiv.org/abs/2109.08668)."""

from typing import Any

import torch.nn.functional as F
from torch import Tensor, nn

from torchtitan.config import JobConfig
from torchtitan.handlers.base import ModelHandler
from torchtitan.handlers.registry import handler_settings


class ReluSquaredFeedForward(nn.Module):
    """The parameters of the one that it replaces, under their names: so tensor parallelism,
    initialisation and checkpoints go on as if nothing had happened."""

    def __init__(self, replaced: nn.Module):
        super().__init__()
        self.w1, self.w2, self.w3 = replaced.w1, replaced.w2, replaced.w3

    def forward(self, x: Tensor) -> Tensor:  # [B, T, D] -> [B, T, F] -> [B, T, D]
        return self.w2(F.relu(self.w1(x)).square() * self.w3(x))


class ReluSquared(ModelHandler):
    """The handler `relu_squared`."""

    def __init__(self, job_config: JobConfig, parallel_dims: Any):
        self.every = handler_settings(job_config, "relu_squared").every

    def convert(self, model: nn.Module) -> None:
        """The model is whole here, and on the meta device."""
        for index, block in enumerate(model.blocks().values()):
            if index % self.every == 0:
                block.feed_forward = ReluSquaredFeedForward(block.feed_forward)
