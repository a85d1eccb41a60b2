"""The tensors of a run as one flat dict, named by parameter.

Names are the same on every mesh; an optimizer's own state dict is a list by index, whose order
differs between pipeline stages. Learning rates, betas and weight decay are not stored: they come
from the config.
"""

import logging
from collections import Counter
from collections.abc import Mapping, Sequence
from typing import Any

import torch
from torch import nn
from torch.distributed.tensor import DTensor
from torch.utils._python_dispatch import is_traceable_wrapper_subclass

from torchtitan.checkpoint.manifest import OPTIMIZER_PREFIX
from torchtitan.distributed.context import DistributedContext
from torchtitan.distributed.finiteness import non_finite_on_any_rank
from torchtitan.utils.dtypes import torch_dtype
from torchtitan.utils.optimizer_state import initial_state
from torchtitan.utils.text import some_of

logger = logging.getLogger(__name__)


def model_tensors(model_parts: Sequence[nn.Module]) -> dict[str, torch.Tensor]:
    """Return parameters and persistent buffers of this rank's parts by full name; tied ones once.

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
    """Return a plain tensor that shares the memory of a tensor subclass.

    A weight that FSDP gathers in float8 is such a subclass around a plain tensor.
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
    """Return `optimizer.<parameter>.<state>` -> live state tensor, including step counts.

    State is created for parameters that have none yet, as the first update would, so that a fresh
    optimizer can be loaded into.

    Raises:
        NotImplementedError: the initial state is unknown, see `torchtitan.utils.optimizer_state`.
        TypeError: an optimizer keeps state that is not a tensor.
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


@torch.no_grad()
def fill_copies(
    model_parts: Sequence[nn.Module], optimizers: Sequence[torch.optim.Optimizer]
) -> None:
    """Copy loaded weights and their optimizer state to second copies on the same rank.

    In a V-shaped pipeline one rank holds both copies of a tied weight.
    """
    names = Counter(name for part in model_parts for name, _ in part.named_parameters())
    if max(names.values(), default=1) == 1:
        return
    loaded = model_tensors(model_parts) | optimizer_tensors(model_parts, optimizers)
    for part in model_parts:
        for name, tensor in model_tensors([part]).items():
            if names[name] > 1:
                tensor.copy_(loaded[name])
    for optimizer in optimizers:
        for name, tensor in optimizer_tensors(model_parts, [optimizer]).items():
            if names[name.removeprefix(OPTIMIZER_PREFIX).rpartition(".")[0]] > 1:
                tensor.copy_(loaded[name])


def _create_state(optimizer: torch.optim.Optimizer) -> None:
    for group in optimizer.param_groups:
        for parameter in group["params"]:
            if parameter.requires_grad and not optimizer.state.get(parameter):
                optimizer.state[parameter] = initial_state(optimizer, parameter, group)


def _require_tensor(optimizer: torch.optim.Optimizer, name: str, value: Any) -> torch.Tensor:
    """Raise TypeError for state that a resume would silently lose, such as a plain number."""
    if not isinstance(value, torch.Tensor):
        kind = type(optimizer).__name__
        raise TypeError(f"{kind} keeps {name} as {type(value).__name__}: it must be a tensor")
    return value


def non_finite_tensors(
    world: DistributedContext, tensors: Mapping[str, torch.Tensor], parts: Sequence[nn.Module]
) -> list[str]:
    """Return the names of tensors that hold NaN or infinity on any rank.

    Parameters and optimizer state must be finite; buffers, which may be masks, only free of NaN.
    """
    parameters = {name for part in parts for name, _ in part.named_parameters()}
    buffers = {
        name for name in tensors if name not in parameters and not name.startswith(OPTIMIZER_PREFIX)
    }
    return non_finite_on_any_rank(world, tensors, buffers)


def exported_tensors(
    world: DistributedContext, tensors: Mapping[str, torch.Tensor], export_dtype: str
) -> dict[str, torch.Tensor]:
    """Return the model's tensors in `export_dtype`, or unchanged if that overflows."""
    if export_dtype == "float32":
        return dict(tensors)
    dtype = torch_dtype(export_dtype)
    exported = {
        name: tensor.to(dtype) if tensor.is_floating_point() else tensor
        for name, tensor in tensors.items()
    }
    before, after = (non_finite_on_any_rank(world, of) for of in (tensors, exported))
    overflown = [name for name in after if name not in before]
    if not overflown:
        return exported
    logger.error(
        "checkpoint.export_dtype = %s cannot hold all values of %s: the weights are saved in"
        " their own type",
        export_dtype,
        some_of(overflown),
    )
    return dict(tensors)
