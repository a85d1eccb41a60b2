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
from torchtitan.utils.optimizer_state import initial_state


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
                tensors[name] = plain_tensor(tensor.detach())
    return tensors


def plain_tensor(tensor: torch.Tensor) -> torch.Tensor:
    """Return what any reader of a checkpoint knows, in the same memory. A weight that FSDP is to
    send in float8 is a tensor of a class of its own around a plain one of the same shape and type.
    """
    if isinstance(tensor, DTensor):
        local = tensor.to_local()
        inner = plain_tensor(local)
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

    State is created for parameters that have none yet, so that a fresh optimizer can be loaded
    into; that is the state that the first update would have started from.

    Raises:
        NotImplementedError: nobody says what that is, see `torchtitan.utils.optimizer_state`.
        TypeError: an optimizer keeps something else than tensors.
    """
    names = {id(value): name for part in model_parts for name, value in part.named_parameters()}
    tensors: dict[str, torch.Tensor] = {}
    for optimizer in optimizers:
        _create_state(optimizer)
        for group in optimizer.param_groups:
            for parameter in group["params"]:
                for key, value in optimizer.state.get(parameter, {}).items():
                    if value is not None:
                        name = f"{OPTIMIZER_PREFIX}{names[id(parameter)]}.{key}"
                        tensors[name] = _require_tensor(optimizer, name, value)
    return tensors


def _create_state(optimizer: torch.optim.Optimizer) -> None:
    for group in optimizer.param_groups:
        for parameter in group["params"]:
            if parameter.requires_grad and not optimizer.state.get(parameter):
                optimizer.state[parameter] = initial_state(optimizer, parameter, group)


def _require_tensor(optimizer: torch.optim.Optimizer, name: str, value: Any) -> torch.Tensor:
    """A step count that is a plain number would be missing after a resume, without a word."""
    if not isinstance(value, torch.Tensor):
        kind = type(optimizer).__name__
        raise TypeError(f"{kind} keeps {name} as {type(value).__name__}: it has to be a tensor")
    return value
