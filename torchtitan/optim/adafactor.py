"""Adafactor: the second moments of a matrix as one row and one column, and no first moment.

https://arxiv.org/abs/1804.04235. Equal to `torch.optim.Adafactor` on one process, which takes means
over rows, columns and whole parameters, and so cannot work on shards. Here the sums over the shards
are all-reduced twice a step, for all parameters of a shape at once: the squares of gradients and
weights, then those of the updates. Row and column are kept whole on every rank; they are small.
"""

from collections.abc import Iterator, Sequence
from typing import Any

import torch
import torch.distributed as dist
from torch import Tensor
from torch.distributed.tensor import DTensor, Replicate

from torchtitan.config.schema import Optimizer as OptimizerSection
from torchtitan.optim.registry import AdafactorSettings, Groups
from torchtitan.parallel.initialize import local_indices
from torchtitan.utils.dtypes import at_least_float32
from torchtitan.utils.optimizer_state import State, zeros
from torchtitan.utils.torch_compat import local_tensor


class Adafactor(torch.optim.Optimizer):
    """Steps matrices and vectors; tensors with more dimensions are treated as vectors."""

    def __init__(self, groups: Groups, lr: float, settings: AdafactorSettings):
        super().__init__(groups, {"lr": lr})
        self._settings = settings
        self._held: dict[Tensor, list[Tensor]] = {}

    @torch.no_grad()
    def step(self, closure: Any = None) -> None:
        """Step all parameters. Collective over the ranks that hold their shards."""
        assert closure is None, "the loss is computed elsewhere"
        stepped = list(self._stepped())
        parameters = [parameter for parameter, _ in stepped]
        sums = sum_over_shards([self._squares(p) for p in parameters], parameters)
        for (parameter, group), found in zip(stepped, sums, strict=True):
            self._average(parameter, group, found)
        squares = [_square_sum(self._update(p)).reshape(1) for p in parameters]
        norms = sum_over_shards(squares, parameters)
        for (parameter, group), found, norm in zip(stepped, sums, norms, strict=True):
            self._apply(parameter, group, found[-1], norm[0])

    def initial_state(self, parameter: Tensor, group: dict[str, Any]) -> State:
        """Return the state before the first step; see `torchtitan.utils.optimizer_state`."""
        state = {"step": torch.zeros((), dtype=torch.float32)}
        if parameter.dim() != 2:
            return state | {"variance": zeros(parameter)}
        rows, columns = parameter.shape
        options: Any = {"dtype": at_least_float32(parameter.dtype), "device": parameter.device}
        return state | {
            "row_var": torch.zeros((rows, 1), **options),
            "col_var": torch.zeros((1, columns), **options),
        }

    def _stepped(self) -> Iterator[tuple[Tensor, dict[str, Any]]]:
        for group in self.param_groups:
            for parameter in group["params"]:
                if parameter.grad is not None:
                    if not self.state[parameter]:
                        self.state[parameter] = self.initial_state(parameter, group)
                    yield parameter, group

    def _squares(self, parameter: Tensor) -> Tensor:
        """Return the shard's sums of squares: the gradient's rows and columns, all weights.

        `[rows + columns + 1]`, for a vector `[1]`.
        """
        weights = _square_sum(local_tensor(parameter)).reshape(1)
        if parameter.dim() != 2:
            return weights
        gradient = _local_gradient(parameter)
        square = gradient.to(at_least_float32(gradient.dtype)).square()
        held = self._held_of(parameter)
        rows, columns = (square.new_zeros(size) for size in parameter.shape)
        rows[held[0]] = square.sum(1)
        columns[held[1]] = square.sum(0)
        return torch.cat([rows, columns, weights])

    def _average(self, parameter: Tensor, group: dict[str, Any], sums: Tensor) -> None:
        """Apply weight decay, and add the newest squares to the averages."""
        state = self.state[parameter]
        state["step"] += 1
        newest = state["step"].double() ** self._settings.beta2_decay
        local_tensor(parameter).mul_(1 - group["lr"] * group["weight_decay"])
        if parameter.dim() != 2:
            variance = local_tensor(state["variance"])
            variance.add_((_local_gradient(parameter).square() - variance) * newest)
            return
        rows, columns = parameter.shape
        of_rows, of_columns = sums[:rows].unsqueeze(1), sums[rows:-1].unsqueeze(0)
        row_var, col_var = state["row_var"], state["col_var"]
        row_var.add_((of_rows / columns - row_var) * newest)
        col_var.add_((of_columns / rows - col_var) * newest)

    def _update(self, parameter: Tensor) -> Tensor:
        """Return the shard of the unscaled update.

        Computed twice instead of kept, because the optimizer exists to save memory.
        """
        state, eps = self.state[parameter], self._settings.eps1
        eps = torch.finfo(parameter.dtype).eps if eps is None else eps
        if parameter.dim() != 2:
            variance = local_tensor(state["variance"])
        else:
            rows, columns = self._held_of(parameter)
            row_var, col_var = state["row_var"], state["col_var"]
            variance = row_var[rows] @ col_var[:, columns] / row_var.mean().clamp(min=eps)
        return variance.clamp(min=eps * eps).rsqrt_().mul_(_local_gradient(parameter))

    def _apply(
        self, parameter: Tensor, group: dict[str, Any], weights: Tensor, update: Tensor
    ) -> None:
        """Scale and apply the update, given the sums of squares of the weights and the update."""
        settings, step = self._settings, self.state[parameter]["step"].double()
        rate = (step**-0.5).clamp(max=group["lr"])
        size = (weights / parameter.numel()).sqrt().clamp(min=settings.eps2)
        too_large = ((update / parameter.numel()).sqrt() / settings.d).clamp(min=1.0)
        local_tensor(parameter).sub_(self._update(parameter) * (size * rate / too_large))

    def _held_of(self, parameter: Tensor) -> list[Tensor]:
        if parameter not in self._held:
            self._held[parameter] = local_indices(parameter)
        return self._held[parameter]


def sum_over_shards(values: Sequence[Tensor], parameters: Sequence[Tensor]) -> list[Tensor]:
    """Sum each vector of `values` over the ranks that hold the shards of its parameter.

    Ranks with copies have the same value already. Collective over the mesh. The order in which an
    all-reduce adds depends on the place in the buffer, so only parameters of one shape share one:
    both copies of a pipeline's tied embeddings get the same bits, whatever else their stages have.
    """
    sums = list(values)
    members: dict[tuple[object, ...], list[int]] = {}
    groups: dict[tuple[object, ...], list[dist.ProcessGroup]] = {}
    for index, parameter in enumerate(parameters):
        if isinstance(parameter, DTensor):
            mesh = parameter.device_mesh
            axes = [n for n, p in enumerate(parameter.placements) if not isinstance(p, Replicate)]
            key = (mesh, *axes, values[index].dtype, parameter.shape)
            members.setdefault(key, []).append(index)
            groups[key] = [mesh.get_group(axis) for axis in axes]
    for key, indices in members.items():
        device = values[indices[0]].device
        total = torch.cat([values[index] for index in indices])
        mesh = parameters[indices[0]].device_mesh  # type: ignore[attr-defined]
        total = total.to(mesh.device_type)  # parameters may be in host memory
        for group in groups[key]:
            dist.all_reduce(total, group=group)
        parts = total.to(device).split([len(values[index]) for index in indices])
        for index, part in zip(indices, parts, strict=True):
            sums[index] = part
    return sums


def _square_sum(tensor: Tensor) -> Tensor:
    return tensor.to(at_least_float32(tensor.dtype)).square().sum()


def _local_gradient(parameter: Tensor) -> Tensor:
    assert parameter.grad is not None
    return local_tensor(parameter.grad)


def build(
    groups: Groups, section: OptimizerSection, settings: AdafactorSettings, device: torch.device
) -> torch.optim.Optimizer:
    """Build Adafactor."""
    return Adafactor(groups, section.lr, settings)
