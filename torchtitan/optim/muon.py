"""Muon for the matrices of the blocks and AdamW for all else, as one optimizer.

Muon (https://kellerjordan.github.io/posts/muon/) steps along the orthogonal matrix nearest to the
average gradient. `torch.optim.Muon` is the same on one process, but treats a shard as the matrix.
Here the average is sharded like the weights. Each step gathers it (in bfloat16, in which it is
orthogonalised anyway), every rank orthogonalises the whole matrix and applies its shard: the same
arithmetic on every mesh, at the cost of one all-gather of the matrices a step and of a computation
that is not divided among the ranks.
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
"""Coefficients of the iterated quintic; they push small singular values up fastest."""
_LEAST_NORM = 1e-7


class Muon(torch.optim.Optimizer):
    """Groups with `orthogonal` are stepped by Muon, the rest by AdamW."""

    def __init__(self, groups: Groups, settings: MuonSettings, adam: dict[str, Any]):
        """Create both optimizers; `adam` holds the arguments of torch's AdamW."""
        super().__init__(groups, {"lr": adam["lr"]})
        self._settings = settings
        # Of the same groups and states, so that from outside there is one optimizer.
        others = [group for group in self.param_groups if not group["orthogonal"]]
        self._adamw = torch.optim.AdamW(others, **adam) if others else None

    @torch.no_grad()
    def step(self, closure: Any = None) -> None:
        """Step all parameters. Collective over the ranks that hold their shards."""
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
        """Return the state before the first step; see `torchtitan.utils.optimizer_state`."""
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
        mine = shard_like(orthogonal, parameter)
        local, lr = local_tensor(parameter), group["lr"]
        local.mul_(1 - lr * group["weight_decay"])
        local.add_(mine, alpha=-lr * _shape_factor(settings, parameter))


def orthogonalise(matrix: Tensor, steps: int) -> Tensor:
    """Return the matrix with singular values of about 1, by Newton-Schulz iteration."""
    a, b, c = _COEFFICIENTS
    x = matrix.T if matrix.size(0) > matrix.size(1) else matrix  # the smaller square is cheaper
    x = x / x.norm().clamp(min=_LEAST_NORM)
    for _ in range(steps):
        square = x @ x.T
        polynomial = torch.addmm(square, square, square, beta=b, alpha=c)
        x = torch.addmm(x, polynomial, x, beta=a)
    return x.T if matrix.size(0) > matrix.size(1) else x


def whole(tensor: Tensor) -> Tensor:
    """Return the whole of a tensor that may be sharded, on the mesh's device. Collective."""
    if not isinstance(tensor, DTensor):
        return tensor
    local, kind = tensor.to_local(), tensor.device_mesh.device_type
    if local.device.type != kind:  # parameters in host memory
        tensor = with_local(tensor, local.to(kind))
    # One axis at a time, in reverse of how FSDP shards what tensor parallelism has sharded; torch
    # does the same when asked for all at once, with a warning.
    cut: Any = tensor
    placements = list(cut.placements)
    for strided in (True, False):
        for axis in range(len(placements)):
            if isinstance(placements[axis], _StridedShard) == strided:
                placements[axis] = Replicate()
                cut = cut.redistribute(placements=placements)
    gathered: Tensor = cut.to_local()
    return gathered


def shard_like(tensor: Tensor, like: Tensor) -> Tensor:
    """Return the shard of a whole matrix that corresponds to that of `like`, on its device."""
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
    """Build Muon; splits each group into matrices for Muon and the rest."""
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
