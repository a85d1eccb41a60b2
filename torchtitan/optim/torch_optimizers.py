"""torch's own optimizers: Adam, AdamW, SGD. All of them work element by element, so what a rank
does to its shards is what one process would do."""

from typing import Any

import torch

from torchtitan.config.schema import Optimizer as OptimizerSection
from torchtitan.optim.settings import SgdSettings

Groups = list[dict[str, Any]]
FUSED_DEVICES = ("cpu", "cuda")


def build_adam(
    groups: Groups, section: OptimizerSection, settings: object, device: torch.device
) -> torch.optim.Optimizer:
    """Adam, whose weight decay is a part of the gradient."""
    return torch.optim.Adam(groups, **adam_options(section, device))


def build_adamw(
    groups: Groups, section: OptimizerSection, settings: object, device: torch.device
) -> torch.optim.Optimizer:
    """AdamW (https://arxiv.org/abs/1711.05101)."""
    return torch.optim.AdamW(groups, **adam_options(section, device))


def adam_options(section: OptimizerSection, device: torch.device) -> dict[str, Any]:
    """What torch's Adam and AdamW are given beside the groups."""
    fused = section.implementation == "fused" and device.type in FUSED_DEVICES
    return {
        "lr": section.lr,
        "betas": (section.beta1, section.beta2),
        "eps": section.eps,
        "fused": fused,
        "foreach": not fused and section.implementation != "for-loop",
    }


def build_sgd(
    groups: Groups, section: OptimizerSection, settings: SgdSettings, device: torch.device
) -> torch.optim.Optimizer:
    """Stochastic gradient descent, whose weight decay is a part of the gradient. Not fused: torch
    has no rule for that of sharded parameters."""
    return torch.optim.SGD(
        groups,
        lr=section.lr,
        momentum=settings.momentum,
        nesterov=settings.nesterov,
        foreach=section.implementation != "for-loop",
    )
