"""AdamW whose moments take one or two bytes a weight instead of four.

Both compute in float32 (float64 for float64 weights) and differ in how they store a moment:

- `AdamWBF16` in bfloat16 with stochastic rounding, so that the mean is right. Rounding to nearest
  would lose changes below 0.4% of a number, which is every change of the second moment.
- `AdamW8bit` in 8 bits (https://arxiv.org/abs/2110.02861): an index into 256 numbers, denser near
  zero, and a scale for each block of a row.

Weights in bfloat16 are rounded stochastically, too. The random bits are a hash of parameter, step
and element, and blocks are those of the whole matrix, so every mesh computes the same run, and
checkpoints hold the stored state exactly. (torchao's versions work on shards: blocks are those of
the shard, random bits those of the rank.)
"""

from collections.abc import Iterator
from functools import cache
from typing import Any

import torch
from torch import Tensor
from torch.distributed.tensor import DTensor, Replicate

from torchtitan.config.errors import ConfigError, ConfigIssue
from torchtitan.config.schema import Optimizer as OptimizerSection
from torchtitan.optim.registry import AdamW8bitSettings, Groups
from torchtitan.parallel.initialize import hashed_bits, local_indices
from torchtitan.utils.dtypes import at_least_float32
from torchtitan.utils.optimizer_state import State, zeros
from torchtitan.utils.torch_compat import local_tensor, with_local

_MOMENTS = ("exp_avg", "exp_avg_sq")
_SMALLEST_QUANTISED = 4096
"""Elements of the smallest parameter that is quantised, as in other implementations."""


class AdamWBF16(torch.optim.Optimizer):
    """AdamW with moments in bfloat16."""

    def __init__(self, groups: Groups, section: OptimizerSection):
        super().__init__(groups, {"lr": section.lr})
        self._section = section

    @torch.no_grad()
    def step(self, closure: Any = None) -> None:
        """Step all parameters. No communication."""
        assert closure is None, "the loss is computed elsewhere"
        for group in self.param_groups:
            for name, parameter in zip(group["names"], group["params"], strict=True):
                if parameter.grad is not None:
                    self._step(name, parameter, group)

    def initial_state(self, parameter: Tensor, group: dict[str, Any]) -> State:
        """Return the state before the first step; see `torchtitan.utils.optimizer_state`."""
        moments = {key: zeros(parameter, torch.bfloat16) for key in _MOMENTS}
        return {"step": torch.zeros((), dtype=torch.float32), **moments}

    def _read(self, parameter: Tensor, dtype: torch.dtype) -> Iterator[Tensor]:
        for key in _MOMENTS:
            yield local_tensor(self.state[parameter][key]).to(dtype)

    def _write(self, parameter: Tensor, moments: tuple[Tensor, Tensor], bits: Tensor) -> None:
        for place, (key, moment) in enumerate(zip(_MOMENTS, moments, strict=True)):
            rounded = stochastic_round(moment, bits >> (16 * place))
            local_tensor(self.state[parameter][key]).copy_(rounded)

    def _step(self, name: str, parameter: Tensor, group: dict[str, Any]) -> None:
        section, state = self._section, self.state[parameter]
        assert parameter.grad is not None
        if not state:
            state.update(self.initial_state(parameter, group))
        local, dtype = local_tensor(parameter), at_least_float32(parameter.dtype)
        gradient = local_tensor(parameter.grad).to(dtype)
        first, second = self._read(parameter, dtype)
        first = first.lerp(gradient, 1 - section.beta1)
        second = second.lerp(gradient.square(), 1 - section.beta2)
        bits = hashed_bits(parameter, f"{name}/{self._count(state)}")
        self._write(parameter, (first, second), bits)
        step, lr = state["step"].double(), group["lr"]
        scale = (second / (1 - section.beta2**step)).sqrt().add_(section.eps)
        weights = local.to(dtype) * (1 - lr * group["weight_decay"])
        weights -= first / (1 - section.beta1**step) / scale * lr
        if local.dtype == torch.bfloat16:
            weights = stochastic_round(weights, bits >> 32)
        local.copy_(weights)

    def _count(self, state: State) -> int:
        """Increment and return the step count, which is in host memory: nothing waits for it."""
        state["step"] += 1
        return int(state["step"].item())


class AdamW8bit(AdamWBF16):
    """AdamW with 8-bit moments of matrices; vectors and small or odd matrices keep float32."""

    def __init__(self, groups: Groups, section: OptimizerSection, settings: AdamW8bitSettings):
        self._block_size = settings.block_size
        self._on_device: dict[tuple[torch.device, bool], Tensor] = {}
        super().__init__(groups, section)
        for group in self.param_groups:
            for name, parameter in zip(group["names"], group["params"], strict=True):
                if self._is_quantised(parameter):
                    _require_whole_blocks(name, parameter, self._block_size)

    def initial_state(self, parameter: Tensor, group: dict[str, Any]) -> State:
        """Return the state before the first step; see `torchtitan.utils.optimizer_state`."""
        state: State = {"step": torch.zeros((), dtype=torch.float32)}
        wide = at_least_float32(parameter.dtype)
        for key in _MOMENTS:
            if not self._is_quantised(parameter):
                state[key] = zeros(parameter, wide)
                continue
            codes = zeros(parameter, torch.uint8)
            # The index of 0.
            local_tensor(codes).fill_(levels(_is_signed(key)).index(0.0))
            state[f"{key}_codes"] = codes
            state[f"{key}_scale"] = _zeros_by_block(parameter, self._block_size)
        return state

    def _is_quantised(self, parameter: Tensor) -> bool:
        """Decide by the whole matrix, not by this rank's shard."""
        return (
            parameter.dim() == 2
            and parameter.numel() >= _SMALLEST_QUANTISED
            and parameter.size(1) % self._block_size == 0
        )

    def _levels(self, device: torch.device, moment: str) -> Tensor:
        """Return the levels on the device; copied once, because a copy makes the host wait."""
        key = device, _is_signed(moment)
        if key not in self._on_device:
            self._on_device[key] = torch.tensor(levels(key[1]), device=device)
        return self._on_device[key]

    def _read(self, parameter: Tensor, dtype: torch.dtype) -> Iterator[Tensor]:
        state = self.state[parameter]
        for key in _MOMENTS:
            if key in state:
                yield local_tensor(state[key]).to(dtype)
                continue
            codes, scale = local_tensor(state[f"{key}_codes"]), local_tensor(state[f"{key}_scale"])
            values = self._levels(codes.device, key)[codes.int()]
            yield (_blocks(values, self._block_size) * scale.unsqueeze(-1)).view_as(codes).to(dtype)

    def _write(self, parameter: Tensor, moments: tuple[Tensor, Tensor], bits: Tensor) -> None:
        state = self.state[parameter]
        for key, moment in zip(_MOMENTS, moments, strict=True):
            if key in state:
                local_tensor(state[key]).copy_(moment)
                continue
            blocks = _blocks(moment.float(), self._block_size)
            scale = blocks.abs().amax(-1).clamp(min=1e-12)
            known = self._levels(moment.device, key)
            between = (known[1:] + known[:-1]) / 2
            if not _is_signed(key):
                between[0] = 0  # otherwise tiny values become 0, and a step divides by them
            codes = torch.bucketize(blocks / scale.unsqueeze(-1), between, out_int32=True)
            local_tensor(state[f"{key}_codes"]).copy_(codes.view_as(moment))
            local_tensor(state[f"{key}_scale"]).copy_(scale)


def stochastic_round(value: Tensor, bits: Tensor) -> Tensor:
    """Round to bfloat16 stochastically, by the lowest 16 of `bits`."""
    exact = value.float().view(torch.int32)
    # The sum carries into the kept bits with the probability of the cut-off fraction.
    rounded = ((exact + (bits & 0xFFFF).int()) & -0x10000).view(torch.float32)
    # The NaN of GPUs has all bits set: one more would make it 0.
    return torch.where(value.isnan(), torch.nan, rounded).bfloat16()


@cache
def levels(signed: bool) -> tuple[float, ...]:
    """Return the 256 levels in rising order: 7 decades up to 1, denser in the larger ones."""
    found = [0.0, 1.0]
    for decade in range(7):
        number = 2 ** (decade + (not signed))
        for n in range(number):
            middle = (0.1 + 0.9 * (n + 0.5) / number) * 10.0 ** (decade - 6)
            found += [middle, -middle] if signed else [middle]
    return tuple(sorted(found))


def _is_signed(moment: str) -> bool:
    return moment == "exp_avg"


def _blocks(tensor: Tensor, size: int) -> Tensor:
    """Reshape `[rows, columns]` to `[rows, blocks, size]`."""
    return tensor.reshape(tensor.size(0), -1, size)


def _zeros_by_block(parameter: Tensor, size: int) -> Tensor:
    """Return a zero for each block, sharded like the matrix."""
    rows, columns = parameter.shape
    if not isinstance(parameter, DTensor):
        return torch.zeros(rows, columns // size, device=parameter.device)
    held = [len(indices) for indices in local_indices(parameter)]
    shape = held[0], held[1] // size
    # torch would move it to the mesh's device, and parameters may be in host memory.
    cut = DTensor.from_local(
        torch.zeros(shape, device=parameter.device_mesh.device_type),
        parameter.device_mesh,
        parameter.placements,
        run_check=False,
        shape=torch.Size([rows, columns // size]),
        stride=(columns // size, 1),
    )
    return with_local(cut, torch.zeros(shape, device=parameter.device))


def _require_whole_blocks(name: str, parameter: Tensor, size: int) -> None:
    """Raise ConfigError if a shard of a row is not a multiple of the block size."""
    if not isinstance(parameter, DTensor):
        return
    mesh, parts = parameter.device_mesh, 1
    for axis, placement in enumerate(parameter.placements):
        if not isinstance(placement, Replicate) and placement.dim == 1:
            parts *= mesh.size(axis)
    if parameter.size(1) % (parts * size):
        problem = (
            f"the rows of {name}, {parameter.size(1)} wide, are sharded over {parts} ranks, and a"
            " block does not fit"
        )
        fix = f"set it to a divisor of {parameter.size(1) // parts}, or shard rows over fewer ranks"
        raise ConfigError(ConfigIssue("optimizer.args.block_size", problem, fix, value=size))


def build_bf16(
    groups: Groups, section: OptimizerSection, settings: object, device: torch.device
) -> torch.optim.Optimizer:
    """Build AdamWBF16."""
    return AdamWBF16(groups, section)


def build_8bit(
    groups: Groups, section: OptimizerSection, settings: AdamW8bitSettings, device: torch.device
) -> torch.optim.Optimizer:
    """Build AdamW8bit."""
    return AdamW8bit(groups, section, settings)
