"""A handler that makes a Llama random: dropout in every place that a mesh treats differently."""

from typing import Any

import torch.nn.functional as F
from torch import Tensor, nn

from torchtitan.handlers.registry import register_handler

P = 0.25


class DroppingLinear(nn.Linear):
    """Drops some of its input, which tensor ranks have whole, as LoRA's adapters do."""

    dropout: nn.Dropout

    def forward(self, x: Tensor) -> Tensor:
        return super().forward(self.dropout(x))


@register_handler("random_model")
class RandomModel:
    """Hidden states are dropped after the embedding, within each block, and after the norm."""

    def __init__(self, job_config: Any, parallel_dims: Any):
        pass

    def convert(self, model: Any) -> None:
        for block in model.blocks().values():
            block.attention.register_forward_hook(_drop)
            block.feed_forward.w1.register_forward_hook(_drop)  # hidden channels: a part of them
            block.attention.wq.__class__ = DroppingLinear
            block.attention.wq.dropout = nn.Dropout(P)
        for end in (model.tok_embeddings, model.norm):
            end.register_forward_hook(_drop)

    def pre_optimizer_hook(self, model: Any) -> None:
        pass

    def post_optimizer_hook(self, model: Any) -> None:
        pass


def _drop(module: nn.Module, args: Any, out: Tensor) -> Tensor:
    return F.dropout(out, P, module.training)
