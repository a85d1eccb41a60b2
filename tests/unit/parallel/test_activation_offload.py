"""Activation offload: what is copied, when the device gets rid of it, and that nothing changes."""

import gc
import weakref
from typing import Any

import pytest
import torch
from torch import nn
from torch.nn.attention.flex_attention import BlockMask, create_block_mask

from torchtitan.config.schema import ActivationCheckpoint
from torchtitan.parallel import activation_offload
from torchtitan.parallel.activation_checkpoint import apply_activation_checkpoint
from torchtitan.parallel.activation_offload import ActivationOffload, apply_activation_offload
from torchtitan.parallel.compile import apply_compile, mark_for_compile

CPU = torch.device("cpu")
WIDTH, LENGTH = 32, 64
BYTES = LENGTH * WIDTH * 4
"""Of one hidden state, which is as large as a weight is not."""


class Block(nn.Module):
    """Two linear maps of the same input, and what a block gets beside its input."""

    def __init__(self) -> None:
        super().__init__()
        self.left = nn.Linear(WIDTH, WIDTH, bias=False)
        self.right = nn.Linear(WIDTH, WIDTH, bias=False)

    def forward(self, x: torch.Tensor, shared: torch.Tensor, fails: bool = False) -> torch.Tensor:
        if fails:
            raise RuntimeError("in the middle")
        return torch.tanh(self.left(x) * self.right(x)) * shared


def build(num_blocks: int = 4) -> dict[str, Block]:
    torch.manual_seed(0)
    return {f"layers.{n}": Block() for n in range(num_blocks)}


def forward(blocks: dict[str, Block]) -> torch.Tensor:
    generator = torch.Generator().manual_seed(1)
    x, shared = (torch.randn(LENGTH, WIDTH, generator=generator) for _ in range(2))
    x.requires_grad_()
    for block in blocks.values():
        x = block(x, shared)
    return x.square().sum()


def gradients(blocks: dict[str, Block]) -> list[torch.Tensor]:
    forward(blocks).backward()
    return [p.grad for block in blocks.values() for p in block.parameters()]  # type: ignore[misc]


def on_device(offload: ActivationOffload) -> list[int]:
    """Tensors of each block's forward that are on the device."""
    return [
        sum(saved.on_device is not None for saved in block.saved.values())
        for block in offload._waiting
    ]


MODES: list[dict[str, Any]] = [
    {"mode": "none"},
    {"mode": "full"},
    {"mode": "selective", "selective_ac_option": "2"},
    {"mode": "selective", "selective_ac_option": "op"},
]


@pytest.mark.parametrize("mode", MODES, ids=lambda mode: "-".join(mode.values()))
@pytest.mark.parametrize("backend", [None, "aot_eager"])
def test_gradients_are_the_same_bits(mode: dict[str, Any], backend: str | None) -> None:
    results = []
    for offloaded in (False, True):
        torch._dynamo.reset()
        blocks = build()
        apply_activation_checkpoint(blocks, ActivationCheckpoint(**mode))
        offload = apply_activation_offload(blocks, CPU) if offloaded else None
        if backend is not None:
            for block in blocks.values():
                mark_for_compile(block, backend)
        apply_compile(blocks)
        loss = forward(blocks)
        if offload is not None:
            assert [len(block.saved) > 0 for block in offload._waiting] == [True] * 4
        loss.backward()
        results.append([p.grad for block in blocks.values() for p in block.parameters()])
    for plain, other in zip(*results, strict=True):
        assert torch.equal(plain, other)  # type: ignore[arg-type]


def test_each_tensor_of_a_block_is_copied_once_and_nothing_else_is(
    monkeypatch: pytest.MonkeyPatch,
) -> None:
    made = []

    class Counted(activation_offload._Saved):
        def __init__(self, *args: Any):
            super().__init__(*args)
            made.append(self.on_host)

    monkeypatch.setattr(activation_offload, "_Saved", Counted)
    blocks = build(1)
    offload = apply_activation_offload(blocks, CPU)
    loss = forward(blocks)
    [block] = offload._waiting
    # The input, which both maps keep; their two results; that of tanh. Not weights or `shared`.
    assert [copy.nbytes for copy in made] == [BYTES] * 4
    assert all(
        saved.on_host.data_ptr() != saved.on_device.data_ptr()  # type: ignore[union-attr]
        for saved in block.saved.values()
    )
    del loss


def test_a_mask_of_blocks_is_not_copied() -> None:
    class Masked(nn.Module):
        def forward(self, x: torch.Tensor, mask: BlockMask) -> torch.Tensor:
            return x * mask.kv_indices[0, 0]

    def causal(_b: Any, _h: Any, query: torch.Tensor, key: torch.Tensor) -> torch.Tensor:
        return query >= key

    mask = create_block_mask(causal, None, None, LENGTH, LENGTH, device="cpu", BLOCK_SIZE=2)
    x = torch.randn(LENGTH // 2, LENGTH // 2, requires_grad=True)
    assert mask.kv_indices.nbytes >= activation_offload.SMALLEST_BYTES
    block = Masked()
    offload = apply_activation_offload({"layers.0": block}, CPU)
    result = block(x, mask)
    assert offload._waiting == []
    del result


def test_what_checkpointing_does_not_keep_is_not_copied() -> None:
    blocks = build(2)
    apply_activation_checkpoint(blocks, ActivationCheckpoint(mode="full"))
    offload = apply_activation_offload(blocks, CPU)
    loss = forward(blocks)
    assert [len(block.saved) for block in offload._waiting] == [1, 1]
    del loss


def test_the_device_holds_two_blocks() -> None:
    blocks = build(5)
    offload = apply_activation_offload(blocks, CPU)
    seen: list[list[int]] = []
    for block in blocks.values():
        block.right.register_full_backward_hook(lambda *_: seen.append(on_device(offload)))
    loss = forward(blocks)
    assert on_device(offload) == [0, 0, 0, 4, 4]
    loss.backward()
    # While a block computes its backward, the one before it is there, and those earlier are not.
    assert seen == [[0, 0, 0, 4], [0, 0, 4], [0, 4], [4], []]


def test_nothing_is_left_after_the_backward() -> None:
    blocks = build()
    offload = apply_activation_offload(blocks, CPU)
    gc.collect()
    gc.disable()  # as in a run: nothing may wait for a collection
    try:
        loss = forward(blocks)
        kept = [weakref.ref(s) for block in offload._waiting for s in block.saved.values()]
        assert len(kept) == 16
        loss.backward()
        del loss
        assert [reference() for reference in kept] == [None] * 16
        assert not offload._waiting and not offload._in_both
    finally:
        gc.enable()


def test_a_forward_without_gradients_keeps_nothing() -> None:
    blocks = build()
    offload = apply_activation_offload(blocks, CPU)
    with torch.no_grad():
        forward(blocks)
    assert not offload._waiting


def test_an_error_in_a_block_ends_the_copying() -> None:
    blocks = build(1)
    offload = apply_activation_offload(blocks, CPU)
    x = torch.randn(LENGTH, WIDTH, requires_grad=True)
    with pytest.raises(RuntimeError, match="in the middle"):
        blocks["layers.0"](x, x, fails=True)
    assert torch.equal(x.exp().grad_fn._saved_result, x.exp())  # type: ignore[union-attr]
    assert offload._open is None and not offload._waiting
