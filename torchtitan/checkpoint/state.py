"""The tensors of a run as one flat dict, named by parameter.

Plain names survive every change of the mesh; an optimizer's own state dict is a list by index,
whose order differs from one pipeline stage to the next. Learning rates, betas and weight decay are
not in it: they come from the config.
"""

from collections.abc import Sequence
from typing import Any

import torch
from torch import nn
from torch.distributed.tensor import DTensor
from torch.utils._python_dispatch import is_traceable_wrapper_subclass

from torchtitan.checkpoint.manifest import OPTIMIZER_PREFIX


def model_tensors(model_parts: Sequence[nn.Module]) -> dict[str, torch.Tensor]:
    """Parameters and persistent buffers of this rank's parts by full name; tied ones once.

    The values are the live tensors (DTensors where sharded): loading into them loads the model.
    """
    tensors: dict[str, torch.Tensor] = {}
    seen: set[int] = set()
    for part in model_parts:
        for name, tensor in part.state_dict(keep_vars=True).items():
            if isinstance(tensor, torch.Tensor) and id(tensor) not in seen:
                seen.add(id(tensor))
                tensors[name] = _plain(tensor.detach())
    return tensors


def _plain(tensor: torch.Tensor) -> torch.Tensor:
    """What any reader of a checkpoint knows. A weight that FSDP is to send in float8 is a tensor of
    a class of its own around a plain one of the same shape and type: that one, in the same memory.
    """
    if isinstance(tensor, DTensor):
        local = tensor.to_local()
        inner = _plain(local)
        return tensor if inner is local else DTensor(inner, tensor._spec, requires_grad=False)
    if not is_traceable_wrapper_subclass(tensor):
        return tensor
    parts = [getattr(tensor, name) for name in tensor.__tensor_flatten__()[0]]
    alike = [part for part in parts if (part.shape, part.dtype) == (tensor.shape, tensor.dtype)]
    return alike[0] if len(alike) == 1 else tensor


def optimizer_tensors(
    model_parts: Sequence[nn.Module], optimizers: Sequence[torch.optim.Optimizer]
) -> dict[str, torch.Tensor]:
    """`optimizer.<parameter>.<state>` -> live state tensor, the step count included.

    State is created, at zero, for parameters that have none yet, so that a fresh optimizer can be
    loaded into; that is the state that the first update would have started from.
    """
    names = {id(value): name for part in model_parts for name, value in part.named_parameters()}
    tensors: dict[str, torch.Tensor] = {}
    for optimizer in optimizers:
        _create_state(optimizer)
        for group in optimizer.param_groups:
            for parameter in group["params"]:
                for key, value in optimizer.state.get(parameter, {}).items():
                    if isinstance(value, torch.Tensor):
                        tensors[f"{OPTIMIZER_PREFIX}{names[id(parameter)]}.{key}"] = value
    return tensors


def _create_state(optimizer: torch.optim.Optimizer) -> None:
    for group in optimizer.param_groups:
        for parameter in group["params"]:
            if parameter.requires_grad and not optimizer.state.get(parameter):
                if not isinstance(optimizer, torch.optim.Adam):
                    kind = type(optimizer).__name__
                    raise NotImplementedError(f"no rule for the initial state of {kind}")
                optimizer.state[parameter] = _adam_state(parameter, group)


def _adam_state(parameter: torch.Tensor, group: dict[str, Any]) -> dict[str, torch.Tensor]:
    """As Adam and AdamW would create it in their first step (AdamW is an Adam in torch)."""
    on_device = bool(group.get("fused") or group.get("capturable"))
    wide = torch.get_default_dtype() == torch.float64 and not group.get("fused")
    state = {
        "step": torch.zeros(
            (),
            dtype=torch.float64 if wide else torch.float32,
            device=parameter.device if on_device else "cpu",
        ),
        "exp_avg": torch.zeros_like(parameter, memory_format=torch.preserve_format),
        "exp_avg_sq": torch.zeros_like(parameter, memory_format=torch.preserve_format),
    }
    if group.get("amsgrad"):
        state["max_exp_avg_sq"] = torch.zeros_like(parameter, memory_format=torch.preserve_format)
    return state
