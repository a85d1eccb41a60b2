"""Find what keeps a model from being sharded as its tensor-parallel plan says.

For plans of other packages' models and handlers: those of the library have no such problems.
"""

from __future__ import annotations

from collections.abc import Mapping
from typing import TYPE_CHECKING

from torch import nn
from torch.distributed.tensor import Placement, Shard

if TYPE_CHECKING:
    from torchtitan.parallel.tensor_parallel import ParallelStyle


def plan_problems(model: nn.Module, plan: Mapping[str, ParallelStyle]) -> list[str]:
    """Return what keeps the uncut `model` from being cut as `plan` says, a sentence each."""
    found = []
    modules = dict(model.named_modules(remove_duplicate=False))
    if unknown := [name for name in plan if name not in modules]:
        found.append(f"the tensor-parallel plan names {', '.join(unknown)}: no such module")
    styles: dict[nn.Module, ParallelStyle] = {}
    for name in plan.keys() & modules.keys():
        if styles.setdefault(modules[name], plan[name]) != plan[name]:
            found.append(f"the tensor-parallel plan cuts {name}, a shared module, in two ways")
    cuts: dict[nn.Parameter, dict[tuple[Placement, Placement | None], str]] = {}
    left_out = []
    for name, parameter in model.named_parameters(remove_duplicate=False):
        holder, _, key = name.rpartition(".")
        style = styles.get(modules[holder])
        if style is None:
            left_out.append(name)
            continue
        cuts.setdefault(parameter, {}).setdefault(style.placements_of(key), name)
        if misfit := _misfit(style, key, modules[holder]):
            found.append(f"the tensor-parallel plan has no place for {name}, {misfit}")
    for names in (" and ".join(cut.values()) for cut in cuts.values() if len(cut) > 1):
        found.append(f"the tensor-parallel plan cuts {names}, one parameter, in two ways")
    if left_out:
        found.append(f"the tensor-parallel plan leaves out {', '.join(left_out)}")
    return found


def _misfit(style: ParallelStyle, key: str, module: nn.Module) -> str | None:
    """Return why a parameter cannot be cut together with the module's weight; None if it can."""
    placement, _ = style.placements_of(key)
    weight, parameter = module._parameters.get("weight"), module._parameters[key]
    assert parameter is not None
    if not isinstance(placement, Shard):
        return None
    if placement.dim >= parameter.dim():
        return f"whose shape is {list(parameter.shape)} where columns are cut"
    if weight is not None and parameter.size(placement.dim) != weight.size(placement.dim):
        shapes = f"{list(parameter.shape)} beside a weight of {list(weight.shape)}"
        return f"whose shape is {shapes}, cut along dimension {placement.dim}"
    return None
