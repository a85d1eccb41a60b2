"""The memory budget reaches the compiler, and only the compilation that it is for."""

import pytest
import torch
import torch._functorch.config
import torch._inductor.config
from torch import nn

from torchtitan.config.schema import ActivationCheckpoint
from torchtitan.parallel.compile import (
    apply_compile,
    mark_for_compile,
    memory_budget_of,
)


class Block(nn.Module):
    """Matrix products, whose results a compiler keeps unless it is told not to."""

    def __init__(self) -> None:
        super().__init__()
        self.layers = nn.ModuleList(nn.Linear(64, 64, bias=False) for _ in range(6))

    def forward(self, x: torch.Tensor) -> torch.Tensor:
        for layer in self.layers:
            x = torch.tanh(layer(x))
        return x


def kept_bytes(section: ActivationCheckpoint, backend: str) -> tuple[int, torch.Tensor]:
    """What a compiled block keeps for its backward, beside weights, and the input's gradient."""
    torch._dynamo.reset()
    torch.manual_seed(0)
    blocks = {str(n): Block() for n in range(2)}
    for block in blocks.values():
        mark_for_compile(block, backend)
    apply_compile(blocks, memory_budget_of(section))
    x = torch.randn(256, 64, requires_grad=True)
    kept = []

    def pack(tensor: torch.Tensor) -> torch.Tensor:
        kept.append(tensor.nbytes * (tensor.shape == x.shape))
        return tensor

    out = x
    with torch.autograd.graph.saved_tensors_hooks(pack, lambda tensor: tensor):
        for block in blocks.values():
            out = block(out)
    out.sum().backward()
    assert x.grad is not None
    return sum(kept), x.grad


@pytest.mark.parametrize("backend", ["aot_eager", "inductor"])
def test_a_smaller_budget_keeps_less(backend: str) -> None:
    kept = []
    gradients = []
    for budget in (1.0, 0.5, 0.0):
        section = ActivationCheckpoint(mode="memory_budget", memory_budget=budget)
        # What is kept is settled before inductor makes kernels, which takes a compiler seconds.
        with torch._inductor.config.patch(fallback_by_default=True):
            num_bytes, gradient = kept_bytes(section, backend)
        kept.append(num_bytes)
        gradients.append(gradient)
    assert kept[0] > kept[1] > kept[2] > 0
    for gradient in gradients[1:]:
        torch.testing.assert_close(gradient, gradients[0])
    assert torch._functorch.config.activation_memory_budget == 1.0


def test_other_modes_have_no_budget() -> None:
    assert memory_budget_of(ActivationCheckpoint(mode="full", memory_budget=0.1)) is None
    assert memory_budget_of(ActivationCheckpoint(mode="memory_budget", memory_budget=0.1)) == 0.1
