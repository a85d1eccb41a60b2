"""Make the state of an optimizer's first step, so that a fresh optimizer can be loaded into."""

from typing import Any

import torch
from torch import Tensor

State = dict[str, Tensor]


def initial_state(
    optimizer: torch.optim.Optimizer, parameter: Tensor, group: dict[str, Any]
) -> State:
    """Return the initial state of one parameter, by name.

    An optimizer's method `initial_state` makes it; torch's Adam, AdamW and SGD have none.

    Raises:
        NotImplementedError: the optimizer is of another kind, without that method.
    """
    own = getattr(optimizer, "initial_state", None)
    if own is not None:
        state: State = own(parameter, group)
        return state
    if isinstance(optimizer, torch.optim.Adam):  # AdamW is one in torch
        return adam_state(parameter, group)
    if isinstance(optimizer, torch.optim.SGD):
        return {"momentum_buffer": zeros(parameter)} if group["momentum"] else {}
    raise NotImplementedError(f"no rule for the initial state of {type(optimizer).__name__}")


def adam_state(parameter: Tensor, group: dict[str, Any]) -> State:
    """Return the state that torch's Adam and AdamW create in their first step."""
    on_device = bool(group.get("fused") or group.get("capturable"))
    wide = torch.get_default_dtype() == torch.float64 and not group.get("fused")
    state = {
        "step": torch.zeros(
            (),
            dtype=torch.float64 if wide else torch.float32,
            device=parameter.device if on_device else "cpu",
        ),
        "exp_avg": zeros(parameter),
        "exp_avg_sq": zeros(parameter),
    }
    if group.get("amsgrad"):
        state["max_exp_avg_sq"] = zeros(parameter)
    return state


def zeros(parameter: Tensor, dtype: torch.dtype | None = None) -> Tensor:
    """Return zeros sharded as the parameter is; of its type, unless `dtype` is given."""
    return torch.zeros_like(parameter, dtype=dtype, memory_format=torch.preserve_format)
