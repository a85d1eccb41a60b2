"""Lion (https://arxiv.org/abs/2302.06675): steps of one size, in the direction of a sign."""

from typing import Any

import torch
from torch import Tensor


class Lion(torch.optim.Optimizer):
    """The optimizer `Lion`. It works element by element, so a parameter that is cut over ranks is
    stepped as one that is whole."""

    @classmethod
    def build(
        cls, groups: list[dict[str, Any]], section: Any, settings: Any, device: torch.device
    ) -> "Lion":
        """`section` is `[optimizer]`, `settings` what `[optimizer.args]` has."""
        betas = {"beta1": settings.beta1, "beta2": settings.beta2}
        return cls([{**group, **betas} for group in groups], {"lr": section.lr})

    def initial_state(self, parameter: Tensor, group: dict[str, Any]) -> dict[str, Tensor]:
        """What the first step finds, and what a checkpoint is loaded into."""
        return {"average": torch.zeros_like(parameter)}

    @torch.no_grad()
    def step(self, closure: None = None) -> None:
        for group in self.param_groups:
            for parameter in group["params"]:
                state = self.state[parameter]
                if not state:
                    state.update(self.initial_state(parameter, group))
                average, gradient = state["average"], parameter.grad
                direction = average.lerp(gradient, 1 - group["beta1"]).sign_()
                average.lerp_(gradient, 1 - group["beta2"])
                parameter.mul_(1 - group["lr"] * group["weight_decay"])
                parameter.add_(direction, alpha=-group["lr"])


build = Lion.build
