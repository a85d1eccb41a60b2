"""The state that an optimizer's first step would start from, so that a fresh one can be loaded
into."""

from typing import Any

import torch
from torch import Tensor

State = dict[str, Tensor]


def initial_state(
    optimizer: torch.optim.Optimizer, parameter: Tensor, group: dict[str, Any]
) -> State:
    """Of one parameter, by name. An optimizer's own method `initial_state` says it; torch's Adam,
    AdamW and SGD have none.

    Raises:
        NotImplementedError: nobody says it.
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
    """As torch's Adam and AdamW would create it in their first step."""
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
    """Cut over ranks as the parameter is; of its type, unless `dtype` says another."""
    return torch.zeros_like(parameter, dtype=dtype, memory_format=torch.preserve_format)
