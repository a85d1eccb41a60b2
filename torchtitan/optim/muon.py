"""Muon (https://kellerjordan.github.io/posts/muon/) for the matrices of the blocks, AdamW for all
else, as one optimizer.

Muon steps along the nearest orthogonal matrix to the average of gradients: all its directions are
learnt equally fast. `torch.optim.Muon` is the same on one process, but takes a shard of a matrix
for the matrix. Here the average is kept, like the weights, in shards. Each step gathers it (in
bfloat16, in which it is orthogonalised anyway), every rank orthogonalises the whole matrix, and
takes its part of what comes out: the same arithmetic on every mesh, for one all-gather of the
matrices a step and a computation that is not divided among the ranks.
"""

import math
from typing import Any

import torch
from torch import Tensor
from torch.distributed.tensor import DTensor, Replicate
from torch.distributed.tensor.placement_types import _StridedShard

from torchtitan.config.schema import Optimizer as OptimizerSection
from torchtitan.optim.optimizer import adam_options
from torchtitan.optim.registry import Groups, MuonSettings, is_orthogonalised
from torchtitan.parallel.initialize import local_indices
from torchtitan.utils.optimizer_state import State, adam_state, zeros
from torchtitan.utils.torch_compat import local_tensor, with_local

_COEFFICIENTS = (3.4445, -4.7750, 2.0315)
"""Of the quintic that is iterated: they push small singular values up fastest."""
_LEAST_NORM = 1e-7


class Muon(torch.optim.Optimizer):
    """Groups with `orthogonal` are matrices for Muon; the others have AdamW."""

    def __init__(self, groups: Groups, settings: MuonSettings, adam: dict[str, Any]):
        """`adam`: what torch's AdamW is given beside its groups."""
        super().__init__(groups, {"lr": adam["lr"]})
        self._settings = settings
        # Of the same groups and states, so that from outside there is one optimizer.
        others = [group for group in self.param_groups if not group["orthogonal"]]
        self._adamw = torch.optim.AdamW(others, **adam) if others else None

    @torch.no_grad()
    def step(self, closure: Any = None) -> None:
        """All ranks that hold parts of the parameters must call it."""
        assert closure is None, "the loss is computed elsewhere"
        if self._adamw is not None:
            self._adamw.state = self.state
            self._adamw.step()
        for group in self.param_groups:
            if group["orthogonal"]:
                for parameter in group["params"]:
                    if parameter.grad is not None:
                        self._step_matrix(parameter, group)

    def initial_state(self, parameter: Tensor, group: dict[str, Any]) -> State:
        """See `torchtitan.utils.optimizer_state`."""
        if group["orthogonal"]:
            return {"momentum_buffer": zeros(parameter)}
        return adam_state(parameter, group)

    def _step_matrix(self, parameter: Tensor, group: dict[str, Any]) -> None:
        settings, state = self._settings, self.state[parameter]
        assert parameter.grad is not None
        if not state:
            state.update(self.initial_state(parameter, group))
        gradient, average = local_tensor(parameter.grad), local_tensor(state["momentum_buffer"])
        average.lerp_(gradient, 1 - settings.momentum)
        direction = gradient.lerp(average, settings.momentum) if settings.nesterov else average
        # In float64 only for what is compared in float64.
        wide = direction.dtype == torch.float64
        update = with_local(parameter, direction if wide else direction.bfloat16())
        orthogonal = orthogonalise(whole(update), settings.ns_steps)
        mine = held_part(orthogonal, parameter)
        local, lr = local_tensor(parameter), group["lr"]
        local.mul_(1 - lr * group["weight_decay"])
        local.add_(mine, alpha=-lr * _shape_factor(settings, parameter))


def orthogonalise(matrix: Tensor, steps: int) -> Tensor:
    """Singular values of about 1 in place of the matrix's own, by Newton-Schulz iteration: a
    polynomial of it, so there is no decomposition. Leaves `matrix` as it is."""
    a, b, c = _COEFFICIENTS
    x = matrix.T if matrix.size(0) > matrix.size(1) else matrix  # the smaller square is cheaper
    x = x / x.norm().clamp(min=_LEAST_NORM)
    for _ in range(steps):
        square = x @ x.T
        polynomial = torch.addmm(square, square, square, beta=b, alpha=c)
        x = torch.addmm(x, polynomial, x, beta=a)
    return x.T if matrix.size(0) > matrix.size(1) else x


def whole(tensor: Tensor) -> Tensor:
    """All of a tensor that may be in shards, on the mesh's device. Collective."""
    if not isinstance(tensor, DTensor):
        return tensor
    local, kind = tensor.to_local(), tensor.device_mesh.device_type
    if local.device.type != kind:  # parameters in host memory
        tensor = with_local(tensor, local.to(kind))
    # One axis at a time, the reverse of how FSDP cuts what tensor parallelism has cut; all at once,
    # torch does the same, and warns of it.
    cut: Any = tensor
    placements = list(cut.placements)
    for strided in (True, False):
        for axis in range(len(placements)):
            if isinstance(placements[axis], _StridedShard) == strided:
                placements[axis] = Replicate()
                cut = cut.redistribute(placements=placements)
    gathered: Tensor = cut.to_local()
    return gathered


def held_part(tensor: Tensor, like: Tensor) -> Tensor:
    """What this rank holds of a whole matrix, if it is cut as `like`; beside the part of `like`."""
    if isinstance(like, DTensor) and not all(isinstance(p, Replicate) for p in like.placements):
        for dim, indices in enumerate(local_indices(like)):
            tensor = tensor.index_select(dim, indices.to(tensor.device))
    return tensor.to(like.device)


def _shape_factor(settings: MuonSettings, parameter: Tensor) -> float:
    rows, columns = parameter.shape
    if settings.adjust_lr_fn == "original":
        return math.sqrt(max(1, rows / columns))
    return 0.2 * math.sqrt(max(rows, columns))


def build(
    groups: Groups, section: OptimizerSection, settings: MuonSettings, device: torch.device
) -> torch.optim.Optimizer:
    """Each group becomes up to two."""
    split: Groups = []
    for group in groups:
        for orthogonal in (True, False):
            pairs = [
                (name, parameter)
                for name, parameter in zip(group["names"], group["params"], strict=True)
                if is_orthogonalised(settings, name, parameter.dim()) == orthogonal
            ]
            factor = group["lr_factor"] * (settings.lr_factor if orthogonal else 1.0)
            if pairs:
                names, params = map(list, zip(*pairs, strict=True))
                own = {"params": params, "names": names, "lr_factor": factor}
                split.append({**group, **own, "orthogonal": orthogonal})
    return Muon(split, settings, adam_options(section, device))
