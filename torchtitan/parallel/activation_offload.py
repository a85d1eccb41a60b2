"""Activation offload: what the backward of a block needs waits for it in host memory.

While a block computes, autograd hands over every tensor that it keeps for the backward; a copy of
it goes to host memory, and the device's memory is free for others. In the backward the copies come
back. On CUDA both run on a stream of their own: a block is copied out while the next ones compute,
and copied back while the block after it computes its backward. So at any time the device holds the
activations of two blocks. Whether the copies are hidden depends on the size of a block's
activations, which grows with the batch, and on the bus.

What is not copied: parameters, which FSDP frees and gathers by itself, a block's inputs beside the
hidden states, which all blocks share, and small tensors. Activation checkpointing comes first, so
that only what it keeps is copied; but what it keeps by operator (`selective_ac_option = "op"`) it
holds by itself, and only a block's input is copied then.
"""

from collections import deque
from collections.abc import Iterable, Mapping
from contextlib import AbstractContextManager, nullcontext
from typing import Any

import torch
from torch import Tensor, nn
from torch.autograd.graph import saved_tensors_hooks

from torchtitan.utils.torch_compat import local_tensor

SMALLEST_BYTES = 4096
"""Smaller tensors stay: copying them takes longer than the memory is worth."""


class _Saved:
    """A tensor that autograd keeps: on the device, in host memory, or in both."""

    def __init__(self, block: "_BlockForward", on_device: Tensor, on_host: Tensor):
        self.block = block
        self.on_device: Tensor | None = on_device
        self.on_host = on_host


class _BlockForward:
    """The tensors that one forward of one block keeps for its backward."""

    def __init__(self, stay: set[int]):
        self.stay = stay
        """Memory of tensors that are not copied."""
        self.saved: dict[Any, _Saved] = {}
        """By what identifies a tensor: several operators may keep the same. Empty once the backward
        has begun; then only autograd knows them, and drops each after its last use."""
        self.copied: torch.cuda.Event | None = None
        self.fetched: torch.cuda.Event | None = None


class ActivationOffload:
    """Copies out and back, for the blocks of a model that run one after the other."""

    def __init__(self, device: torch.device):
        self._device = device
        self._stream: torch.cuda.Stream | None = None
        self._open: tuple[_BlockForward, saved_tensors_hooks] | None = None
        self._waiting: list[_BlockForward] = []
        """Those whose backward has not begun, in the order of the forward."""
        self._in_both: deque[_BlockForward] = deque()
        """The newest ones, which are on the device, too."""

    # Not compiled: compiled blocks hand over what they keep as others do.
    @torch.compiler.disable
    def begin(self, block: nn.Module, args: tuple[Any, ...], kwargs: dict[str, Any]) -> None:
        """A block's forward begins, with the hidden states as its first argument."""
        if not torch.is_grad_enabled():
            return
        while len(self._in_both) > 1:
            self._free(self._in_both.popleft())
        stay = {_memory_of(tensor) for tensor in _tensors([*block.parameters(), args[1:], kwargs])}
        hooks = saved_tensors_hooks(self._pack, self._unpack)
        hooks.__enter__()
        self._open = _BlockForward(stay), hooks

    @torch.compiler.disable
    def end(self, *_: Any) -> None:
        """It ends, possibly by an error."""
        if self._open is None:
            return
        (block, hooks), self._open = self._open, None
        hooks.__exit__()
        block.stay.clear()
        if block.saved:
            block.copied = self._mark()
            self._waiting.append(block)
            self._in_both.append(block)

    def _pack(self, tensor: Tensor) -> Any:
        assert self._open is not None
        block, _ = self._open
        if (
            type(tensor) is not Tensor
            or tensor.nbytes < SMALLEST_BYTES
            or tensor.device.type != self._device.type
            or _memory_of(tensor) in block.stay
        ):
            return tensor
        # Its memory cannot become another tensor's meanwhile, since the first one found is held.
        key = tensor.data_ptr(), tensor.shape, tensor.stride(), tensor.dtype
        if key not in block.saved:
            host = torch.empty_like(tensor, device="cpu", pin_memory=tensor.is_cuda)
            if host.stride() != tensor.stride():  # a part of another tensor, whose memory stays
                return tensor
            with self._beside():
                host.copy_(tensor, non_blocking=True)
            block.saved[key] = _Saved(block, tensor, host)
        return block.saved[key]

    def _unpack(self, kept: Any) -> Tensor:
        if isinstance(kept, Tensor):
            return kept
        block = kept.block
        if block.saved:
            self._begin_backward(block)
        self._wait_for(block.fetched)
        return kept.on_device

    def _begin_backward(self, block: _BlockForward) -> None:
        place = self._waiting.index(block)
        self._fetch(block)
        if place > 0:  # most likely the next one
            self._fetch(self._waiting[place - 1])
        del self._waiting[place]
        if block in self._in_both:  # copies under way are of no use now, and do no harm
            self._in_both.remove(block)
        block.saved.clear()

    def _free(self, block: _BlockForward) -> None:
        """Give the device's memory to what is computed from here on."""
        self._wait_for(block.copied)
        for saved in block.saved.values():
            saved.on_device = None

    def _fetch(self, block: _BlockForward) -> None:
        """Have on the device what is not there."""
        absent = [saved for saved in block.saved.values() if saved.on_device is None]
        if not absent:
            return
        # Memory of the stream that computes, which waits for the copies before it uses them.
        for saved in absent:
            saved.on_device = torch.empty_like(saved.on_host, device=self._device, pin_memory=False)
        with self._beside():
            for saved in absent:
                assert saved.on_device is not None
                saved.on_device.copy_(saved.on_host, non_blocking=True)
        block.fetched = self._mark()

    # --- streams: CUDA only, not run by any test here; elsewhere copies are made at once ----------

    def _beside(self) -> AbstractContextManager[Any]:
        """The stream of copies, from where the computation is now."""
        if self._device.type != "cuda":
            return nullcontext()
        if self._stream is None:
            self._stream = torch.cuda.Stream()
        self._stream.wait_stream(torch.cuda.current_stream())
        return torch.cuda.stream(self._stream)

    def _mark(self) -> torch.cuda.Event | None:
        return None if self._stream is None else self._stream.record_event()

    def _wait_for(self, event: torch.cuda.Event | None) -> None:
        """Let the computation wait; the host does not."""
        if event is not None:
            torch.cuda.current_stream().wait_event(event)


def apply_activation_offload(
    blocks: Mapping[str, nn.Module], device: torch.device
) -> ActivationOffload:
    """Offload the activations of the blocks, in place.

    Parameters must be gathered when these hooks run, so apply data parallelism later.
    """
    offload = ActivationOffload(device)
    for block in blocks.values():
        block.register_forward_pre_hook(offload.begin, with_kwargs=True)
        block.register_forward_hook(offload.end, always_call=True)
    return offload


def _tensors(value: Any) -> Iterable[Tensor]:
    if isinstance(value, Tensor):
        yield value
    elif isinstance(value, Mapping):
        yield from _tensors(list(value.values()))
    elif isinstance(value, (list, tuple)):
        for member in value:
            yield from _tensors(member)
    elif hasattr(value, "as_tuple"):  # FlexAttention's BlockMask, which takes long to import
        yield from _tensors(value.as_tuple())


def _memory_of(tensor: Tensor) -> int:
    """Return an identifier of the tensor's storage, valid while that exists."""
    return local_tensor(tensor.detach()).untyped_storage()._cdata
